// torch's own threads for passes over large tensors. See team.cpp.
#pragma once

#include "pool.h"

namespace hanlin {

// Calls run(job, part) for every part < parts. What a part computes must not depend on who computes it.
void together(Part run, const void* job, int parts);

}  // namespace hanlin
