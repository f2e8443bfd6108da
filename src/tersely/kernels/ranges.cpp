// Which of several grids of integers rounds each group of weights best (ranges.py says what for).
//
// A group stays in the cache while all grids are tried on it.  |x|^2.4 goes by way of logarithms to base 2.

#include "lanes.h"

namespace {

// |x|^2.4, to a few millionths of it; what is below 2^-50 becomes 0
Floats power(Floats x) {
    constexpr int32_t HALF_ROOT = 0x3f3504f3;  // the bits of √½: mantissas run from there to √2
    const Floats none = {};
    const Integers bits = as_bits(x), exponent = (bits - HALF_ROOT) >> 23;
    const Floats mantissa = as_floats(bits - (exponent << 23));
    const Floats turned = (mantissa - 1.0f) / (mantissa + 1.0f), square = turned * turned;
    Floats series = none + 0.32059890f;  // 2 / (9 ln 2), and so on downwards: the area tangent
    series = series * square + 0.41219859f;
    series = series * square + 0.57707802f;
    series = series * square + 0.96179669f;
    series = series * square + 2.88539008f;
    const Floats raised = 2.4f * (__builtin_convertvector(exponent, Floats) + turned * series);
    const auto gone = raised < none - 120.0f;
    const Floats whole = rounded(gone ? none : raised), rest = (gone ? none : raised) - whole;
    Floats sum = none + 1.5403530e-4f;  // (ln 2)^n / n!
    sum = sum * rest + 1.3333558e-3f;
    sum = sum * rest + 9.6181291e-3f;
    sum = sum * rest + 5.5504109e-2f;
    sum = sum * rest + 2.4022651e-1f;
    sum = sum * rest + 6.9314718e-1f;
    sum = sum * rest + 1.0f;
    return gone ? none : sum * as_floats((__builtin_convertvector(whole, Integers) + 127) << 23);
}

struct Ranges {
    const float *weight, *scales, *zeros;
    int64_t* best;
    int64_t rows, columns, groups, size, tries;
    float top;
};

void choose(const Ranges& of, int64_t start, int64_t end) {
    const int64_t padded = (of.size + LANES - 1) / LANES * LANES;
    std::vector<float> group(padded);
    for (int64_t row = start; row < end; ++row)
        for (int64_t number = 0; number < of.groups; ++number) {
            const int64_t first = number * of.size, count = std::min(of.size, of.columns - first);
            std::copy_n(of.weight + row * of.columns + first, count, group.begin());
            std::fill(group.begin() + count, group.end(), 0.0f);  // a level of every grid: no error
            float least = 0;
            int64_t best = 0;
            for (int64_t tried = 0; tried < of.tries; ++tried) {
                const int64_t at = (tried * of.rows + row) * of.groups + number;
                const float scale = of.scales[at], zero = of.zeros[at], per_weight = 1.0f / scale;
                const Floats none = {}, top = none + of.top, reach = none + 4e6f;
                Floats sum = {};
                bool behind = false;
                for (int64_t column = 0; column < padded && !behind; column += LANES) {
                    const Floats weight = load(group.data() + column);
                    Floats steps = weight * per_weight;
                    steps = steps > reach ? reach : steps;
                    steps = steps < -reach ? -reach : steps;
                    Floats level = rounded(steps) + zero;
                    level = level < none ? none : level;
                    level = level > top ? top : level;
                    const Floats off = weight - (level - zero) * scale;
                    sum += power(off < none ? -off : off);
                    behind = tried != 0 && total(sum) >= least;  // errors only add up
                }
                if (!behind) {
                    least = total(sum);
                    best = tried;
                }
            }
            of.best[row * of.groups + number] = best;
        }
}

}  // namespace

extern "C" void best_ranges(const float* weight, const float* scales, const float* zeros, int64_t* best, int64_t rows,
                            int64_t columns, int64_t groups, int64_t size, int64_t tries, int64_t top,
                            int64_t threads) {
    const Ranges of{weight, scales, zeros, best, rows, columns, groups, size, tries, static_cast<float>(top)};
    divide(rows, 1, threads, [&of](int64_t start, int64_t end) { choose(of, start, end); });
}
