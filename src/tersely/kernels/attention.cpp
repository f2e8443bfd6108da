// softmax(scale Q Kᵀ) V where every token looks at itself and those before it (attention.py says what for).
//
// A few queries at a time see all of their keys: their products with a strip of keys stay in registers, their row of
// weights in the cache, and nothing beyond the last key that one of them may see is ever multiplied.  Keys are laid out
// once in strips, channel by channel, so that a strip's keys are lanes; values are laid out token by token.

#include "lanes.h"

#include <limits>

namespace {

#if defined(__AVX512F__)
constexpr int64_t QUERIES = 8;
#else
constexpr int64_t QUERIES = 4;
#endif
constexpr int64_t STRIP = 2 * LANES;

// e^x for x <= 0, to a few 1e-8; what is not a number stays that, and what float32 cannot hold becomes 0
Floats exponential(Floats x) {
    const Floats none = {};
    const auto gone = x < none - 87.0f;
    x = gone ? none : x;
    const Floats power = rounded(x * 1.44269504f);
    const Floats rest = (x - power * 0.693359375f) + power * 2.12194440e-4f;  // ln 2 in two parts
    Floats sum = none + 1.98756915e-4f;  // Cephes' expf
    sum = sum * rest + 1.39819995e-3f;
    sum = sum * rest + 8.33345190e-3f;
    sum = sum * rest + 4.16657962e-2f;
    sum = sum * rest + 1.66666654e-1f;
    sum = sum * rest + 0.5f;
    sum = sum * rest * rest + rest + 1.0f;
    return gone ? none : sum * as_floats((__builtin_convertvector(power, Integers) + 127) << 23);
}

struct Strides {
    int64_t batch, head, token;
};

struct Attention {
    const float *queries, *keys, *values;
    float* out;
    Strides of_queries, of_keys, of_values, of_out;
    int64_t batches, heads, shared, length;  // `shared` heads in a row read the same keys and values
    int64_t width, value_width;              // channels, multiples of 16
    float scale;
};

// What one thread works in.
struct Bench {
    int64_t padded;  // keys, up to whole strips
    std::vector<float> keys, values, queries, weights;

    explicit Bench(const Attention& of)
        : padded((of.length + STRIP - 1) / STRIP * STRIP),
          keys(padded * of.width),
          values(padded * of.value_width),
          queries(QUERIES * of.width),
          weights(QUERIES * padded) {}
};

void lay_out(const Attention& of, const float* keys, const float* values, Bench& bench) {
    for (int64_t token = 0; token < of.length; ++token) {
        float* strip = bench.keys.data() + token / STRIP * STRIP * of.width + token % STRIP;
        for (int64_t channel = 0; channel < of.width; ++channel)
            strip[channel * STRIP] = keys[token * of.of_keys.token + channel];
        std::copy_n(values + token * of.of_values.token, of.value_width, bench.values.data() + token * of.value_width);
    }
}

void multiply_strip(Bench& bench, int64_t first, int64_t width) {
    const float* strip = bench.keys.data() + first * width;
    Floats left[QUERIES] = {}, right[QUERIES] = {};
    for (int64_t channel = 0; channel < width; ++channel) {
        const Floats near = load(strip + channel * STRIP), far = load(strip + channel * STRIP + LANES);
        for (int64_t i = 0; i < QUERIES; ++i) {
            const float query = bench.queries[i * width + channel];
            left[i] += near * query;
            right[i] += far * query;
        }
    }
    float* weights = bench.weights.data() + first;
    for (int64_t i = 0; i < QUERIES; ++i) {
        store(weights + i * bench.padded, left[i]);
        store(weights + i * bench.padded + LANES, right[i]);
    }
}

// Products that may be seen become weights, the others zero; returns what the weights add up to.
float weigh(float* products, int64_t seen, int64_t end) {
    std::fill(products + seen, products + end, -std::numeric_limits<float>::infinity());
    Floats most = load(products);
    for (int64_t key = LANES; key < end; key += LANES) {
        const Floats next = load(products + key);
        most = next > most ? next : most;
    }
    float largest = most[0];
    for (int64_t lane = 1; lane < LANES; ++lane) largest = std::max(largest, static_cast<float>(most[lane]));
    Floats sum = {};
    for (int64_t key = 0; key < end; key += LANES) {
        const Floats weight = exponential(load(products + key) - largest);
        store(products + key, weight);
        sum += weight;
    }
    return total(sum);
}

template <int64_t VECTORS>
void add_values(const Bench& bench, int64_t seen, int64_t width, int64_t channel, float (*out)[VECTORS * LANES]) {
    Floats sums[QUERIES][VECTORS] = {};
    for (int64_t key = 0; key < seen; ++key) {
        const float* value = bench.values.data() + key * width + channel;
        for (int64_t i = 0; i < QUERIES; ++i) {
            const float weight = bench.weights[i * bench.padded + key];
            for (int64_t v = 0; v < VECTORS; ++v) sums[i][v] += load(value + v * LANES) * weight;
        }
    }
    for (int64_t i = 0; i < QUERIES; ++i)
        for (int64_t v = 0; v < VECTORS; ++v) store(out[i] + v * LANES, sums[i][v]);
}

template <int64_t VECTORS>
void write_values(const Attention& of, const Bench& bench, int64_t last, int64_t channel, const float* sums,
                  int64_t queries, float* out) {
    float made[QUERIES][VECTORS * LANES];
    add_values<VECTORS>(bench, last, of.value_width, channel, made);
    for (int64_t i = 0; i < queries; ++i)
        for (int64_t lane = 0; lane < VECTORS * LANES; ++lane)
            out[i * of.of_out.token + channel + lane] = made[i][lane] / sums[i];
}

void attend(const Attention& of, const float* queries, float* out, Bench& bench) {
    for (int64_t first = 0; first < of.length; first += QUERIES) {
        const int64_t count = std::min(QUERIES, of.length - first), last = first + count;
        for (int64_t i = 0; i < count; ++i)
            for (int64_t channel = 0; channel < of.width; ++channel)
                bench.queries[i * of.width + channel] = queries[(first + i) * of.of_queries.token + channel] * of.scale;
        const int64_t end = (last + STRIP - 1) / STRIP * STRIP;
        for (int64_t strip = 0; strip < end; strip += STRIP) multiply_strip(bench, strip, of.width);
        float sums[QUERIES];
        for (int64_t i = 0; i < count; ++i) sums[i] = weigh(bench.weights.data() + i * bench.padded, first + i + 1, end);
        float* rows = out + first * of.of_out.token;
        int64_t channel = 0;
        for (; channel + STRIP <= of.value_width; channel += STRIP)
            write_values<2>(of, bench, last, channel, sums, count, rows);
        for (; channel < of.value_width; channel += LANES) write_values<1>(of, bench, last, channel, sums, count, rows);
    }
}

// Heads that share keys, from one to another of all batches.
void attend_some(const Attention& of, int64_t start, int64_t end) {
    Bench bench(of);
    const int64_t groups = of.heads / of.shared;
    for (int64_t number = start; number < end; ++number) {
        const int64_t batch = number / groups, group = number % groups;
        lay_out(of, of.keys + batch * of.of_keys.batch + group * of.of_keys.head,
                of.values + batch * of.of_values.batch + group * of.of_values.head, bench);
        for (int64_t head = group * of.shared; head < (group + 1) * of.shared; ++head)
            attend(of, of.queries + batch * of.of_queries.batch + head * of.of_queries.head,
                   of.out + batch * of.of_out.batch + head * of.of_out.head, bench);
    }
}

}  // namespace

extern "C" int64_t worth_it() { return FUSES; }

// Strides, in numbers: batch, head, token; channels lie one behind the other.
extern "C" void causal_attention(const float* queries, const float* keys, const float* values, float* out,
                                 const int64_t* strides, int64_t batches, int64_t heads, int64_t shared, int64_t length,
                                 int64_t width, int64_t value_width, float scale, int64_t threads) {
    const auto at = [strides](int64_t of) { return Strides{strides[3 * of], strides[3 * of + 1], strides[3 * of + 2]}; };
    const Attention of{queries, keys,  values, out,    at(0),  at(1),       at(2), at(3),
                       batches, heads, shared, length, width,  value_width, scale};
    divide(batches * (heads / shared), 1, threads, [&of](int64_t start, int64_t end) { attend_some(of, start, end); });
}
