// A few threads that share one job at a time. See pool.cpp.
#pragma once

namespace hanlin {

using Part = void (*)(const void* job, int part);

int threads();

// Calls run(job, part) for every part < parts, on this thread and on whichever helpers are free. What a part computes
// must not depend on who computes it. large: worth waking helpers that sleep.
void share(Part run, const void* job, int parts, bool large);

}  // namespace hanlin
