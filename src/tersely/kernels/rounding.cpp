// The columns of one block of an error feedback sweep, rounded to a grid of integers (rounding.py says what for).
//
// Row by row of the weight nothing depends on anything else, so rows are the lanes.  A column looks back at the errors
// of all columns before it instead of spreading its own to all behind: the sum then stays in registers.  It adds up in
// the reference's order, and fuses products and sums where the processor does that at once, as PyTorch does with whole
// vectors: errors are the reference's but for the last bits of the rows that do not fill one.

#include "lanes.h"

namespace {

constexpr int64_t ROWS = 64;  // at a time

template <typename real>
struct Block {
    int64_t count, rows;        // columns of the block, rows of the weight
    const real* columns;        // [count, rows]: the weight
    real* left;                 // [count, rows]: up to date with all blocks before; on return less what was taken
    real* off;                  // [count, rows]: weight - taken
    const real* follows;        // [count, count] and a stride: row i holds what an error in column j < i adds to column i
    int64_t stride;
    const real* scales;         // [groups, rows]
    const real* zeros;          // [groups, rows]
    int64_t size;               // columns of a group
    const real* stretch;        // scale of each column of the weight, or null
    const int64_t* places;      // [count]: which columns of the weight these are
    uint8_t* codes;             // [columns of the weight, rows]
    real top;                   // the highest code
    bool free;                  // zero points are no codes, and are added before rounding
};

template <typename real>
real fused(real a, real b, real c) {  // a b + c
#ifdef FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

template <typename real>
void round_rows(const Block<real>& block, int64_t start, int64_t end) {
    std::vector<real> errors(block.count * ROWS);
    for (int64_t first = start; first < end; first += ROWS) {
        const int64_t lanes = std::min(ROWS, end - first);
        for (int64_t i = 0; i < block.count; ++i) {
            const int64_t at = i * block.rows + first, place = block.places[i];
            const int64_t group = place / block.size * block.rows + first;
            real sum[ROWS] = {}, scale[ROWS], zero[ROWS], weight[ROWS], taken[ROWS];
            uint8_t code[ROWS];
            std::fill_n(scale, ROWS, real(1));
            std::fill_n(zero, ROWS, real(0));
            std::fill_n(weight, ROWS, real(0));
            std::copy_n(block.left + at, lanes, sum);
            std::copy_n(block.scales + group, lanes, scale);
            std::copy_n(block.zeros + group, lanes, zero);
            std::copy_n(block.columns + at, lanes, weight);
            for (int64_t j = 0; j < i; ++j) {
                const real share = block.follows[i * block.stride + j];
                const real* error = errors.data() + j * ROWS;
                for (int64_t lane = 0; lane < ROWS; ++lane) sum[lane] = fused(share, error[lane], sum[lane]);
            }
            const real stretch = block.stretch ? block.stretch[place] : real(1);
            real* error = errors.data() + i * ROWS;
            for (int64_t lane = 0; lane < ROWS; ++lane) {
                const real steps = sum[lane] / stretch / scale[lane];
                real level = block.free ? std::nearbyint(steps + zero[lane]) : std::nearbyint(steps) + zero[lane];
                level = level < real(0) ? real(0) : level;  // so written, what is not a number stays that
                level = level > block.top ? block.top : level;
                code[lane] = static_cast<uint8_t>(static_cast<int32_t>(level));
                taken[lane] = (level - zero[lane]) * scale[lane] * stretch;
                error[lane] = weight[lane] - taken[lane];
                sum[lane] -= taken[lane];
            }
            std::copy_n(sum, lanes, block.left + at);
            std::copy_n(error, lanes, block.off + at);
            std::copy_n(code, lanes, block.codes + place * block.rows + first);
        }
    }
}

}  // namespace

#define ROUND_BLOCK(name, real)                                                                                        \
    extern "C" void name(int64_t count, int64_t rows, const real* columns, real* left, real* off, const real* follows, \
                         int64_t stride, const real* scales, const real* zeros, int64_t size, const real* stretch,     \
                         const int64_t* places, uint8_t* codes, int64_t top, int64_t free, int64_t threads) {          \
        const Block<real> block{count, rows, columns, left, off, follows, stride, scales, zeros, size, stretch,        \
                                places, codes, static_cast<real>(top), free != 0};                                     \
        divide(rows, ROWS, threads, [&block](int64_t start, int64_t end) { round_rows(block, start, end); });          \
    }

ROUND_BLOCK(round_block_float32, float)
ROUND_BLOCK(round_block_float64, double)
