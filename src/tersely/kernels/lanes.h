// Numbers side by side, as many as the processor has room for, and work side by side on threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

// Whether products and sums are fused; where not, PyTorch's own libraries, which ask the processor, are faster.
#ifdef FP_FAST_FMAF
constexpr int64_t FUSES = 1;
#else
constexpr int64_t FUSES = 0;
#endif

typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

inline Floats load(const float* from) {
    Floats of;
    std::memcpy(&of, from, sizeof of);
    return of;
}

inline void store(float* to, Floats of) { std::memcpy(to, &of, sizeof of); }

inline Floats as_floats(Integers bits) {
    Floats of;
    std::memcpy(&of, &bits, sizeof of);
    return of;
}

inline Integers as_bits(Floats of) {
    Integers bits;
    std::memcpy(&bits, &of, sizeof bits);
    return bits;
}

// Halves go to the even number; below 2^22, where nothing is left behind the point beside 1.5 · 2^23.
inline Floats rounded(Floats x) {
    constexpr float POINT = 12582912.0f;
    return (x + POINT) - POINT;
}

inline float total(Floats of) {
    float sum = 0;
    for (int64_t lane = 0; lane < LANES; ++lane) sum += of[lane];
    return sum;
}

// part(start, end) on threads, for all from 0 to `count`, in multiples of `unit`.
template <typename Part>
void divide(int64_t count, int64_t unit, int64_t threads, const Part& part) {
    const int64_t units = (count + unit - 1) / unit, share = std::max<int64_t>(1, (units + threads - 1) / threads) * unit;
    std::vector<std::thread> others;
    for (int64_t start = share; start < count; start += share) {
        const auto one = [&part, start, share, count] { part(start, std::min(start + share, count)); };
        try {
            others.emplace_back(one);
        } catch (const std::system_error&) {
            one();  // the system has no more threads to give
        }
    }
    part(0, std::min(share, count));
    for (auto& other : others) other.join();
}
