// Vectors of floats as wide as the processor's, in GCC's and Clang's vector types; elements in and out; 2^x and tanh.
//
// HEAD_DIM and ELEMENT are macros of the command line.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int VECTORS = (HEAD_DIM + LANES - 1) / LANES, PADDED = VECTORS * LANES;  // of a head
constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
constexpr float NONE = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Shorts __attribute__((vector_size(2 * LANES)));

#if ELEMENT == FLOAT32
typedef float Element;
#else
typedef uint16_t Element;  // its bits
#endif

inline Floats splat(float x) { return x - Floats{}; }
inline Ints splat(int x) { return x - Ints{}; }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Ints counted() {
    Ints x;
    for (int i = 0; i < LANES; i++) x[i] = i;
    return x;
}

inline Floats load(const float* x) {
    Floats y;
    std::memcpy(&y, x, sizeof y);
    return y;
}

inline void store(float* x, Floats y) { std::memcpy(x, &y, sizeof y); }

inline Floats load(const uint16_t* x) {
    Shorts narrow;
    std::memcpy(&narrow, x, sizeof narrow);
#if defined(__AVX512F__)
    const Ints bits = (Ints)_mm512_cvtepu16_epi32((__m256i)narrow);  // GCC makes the same in four instructions
#else
    const Ints bits = __builtin_convertvector(narrow, Ints);
#endif
#if ELEMENT == FLOAT16
    const Ints magnitude = (bits & 0x7fff) << 13, special = (Ints)(magnitude >= 0x0f800000) & 0x70000000;
    const Floats shifted = (Floats)magnitude * 0x1p112f;  // exponents are biased by 15 there, by 127 here
    return (Floats)((Ints)shifted | special | (bits & 0x8000) << 16);
#else
    return (Floats)(bits << 16);
#endif
}

inline float widen(Element x) {
#if ELEMENT == FLOAT32
    return x;
#elif ELEMENT == FLOAT16
    _Float16 half;
    std::memcpy(&half, &x, sizeof half);
    return half;
#else
    const uint32_t bits = (uint32_t)x << 16;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    return y;
#endif
}

inline Element narrow(float x) {
#if ELEMENT == FLOAT32
    return x;
#elif ELEMENT == FLOAT16
    const _Float16 half = (_Float16)x;
    Element bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
#else
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}

template <int... I>
inline Floats sum_pairs(Floats a, Floats b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
}

// The sums of LANES vectors, as one vector.
inline Floats sums(Floats* x) {
    for (int count = LANES / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            x[i] = sum_pairs(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, LANES>{});
    return x[0];
}

// 2^x for x <= 0; 0 below the normal numbers. NaN stays NaN.
inline Floats exp2_of(Floats x) {
    const Floats clamped = x < -126.0f ? splat(-126.0f) : x;
    const Floats shifted = clamped + 0x1.8p23f;  // the integer nearest to x, in the low bits
    const Floats f = clamped - (shifted - 0x1.8p23f);
    Floats p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const Floats power = (Floats)(((Ints)shifted << 23) + 0x3f800000);
    return x < -126.0f ? Floats{} : p * power;
}

inline Floats tanh_of(Floats x) {
    const Floats size = (Floats)((Ints)x & 0x7fffffff), e = exp2_of(-2 * LOG2_E * size), y = x * x;
    const Floats far = (Floats)((Ints)((1 - e) / (1 + e)) | ((Ints)x & (int)0x80000000));
    const Floats near = x + x * y * (-0.333333333f + y * (0.133333333f + y * (-0.0539682540f + y * (0.0218694885f
                        - y * 0.00886323552f))));
    return size < 0.35f ? near : far;
}
