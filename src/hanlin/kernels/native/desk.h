// Working memory of a part of a job, kept by its thread.
#pragma once

#include <cstdint>
#include <vector>

namespace hanlin {

inline int64_t whole(int64_t n) { return (n + 31) / 32 * 32; }

// `numbers`: how many of four bytes are taken in all. What is taken is aligned to cache lines, and holds anything.
class Desk {
    std::vector<char>& held;
    int64_t used = 0;

    static std::vector<char>& own() {
        static thread_local std::vector<char> memory;
        return memory;
    }

  public:
    explicit Desk(int64_t numbers) : held(own()) {
        if (int64_t(held.size()) < numbers * 4 + 2048) held.resize(numbers * 4 + 2048);
    }
    template <class T>
    T* take(int64_t numbers) {
        char* start = (char*)(((uintptr_t)held.data() + used + 63) / 64 * 64);
        used = start + numbers * int64_t(sizeof(T)) - held.data();
        return (T*)start;
    }
};

}  // namespace hanlin
