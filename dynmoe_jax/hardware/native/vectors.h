// Vectors as wide as the machine's registers, by the extension that GCC and Clang share.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

namespace dynmoe {

// A tile of a product stays in registers: kTileRows x kTileVectors sums, beside them one row of
// vectors and one broadcast number.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 14, kTileVectors = 2;  // 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 6, kTileVectors = 2;  // 16 registers
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 12, kTileVectors = 2;  // 32 registers
#else
constexpr int kLanes = 4, kTileRows = 6, kTileVectors = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));
typedef float Anywhere __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vector load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }

inline void store(float* to, Vector x) { *reinterpret_cast<Anywhere*>(to) = x; }

// The first n numbers, at most kLanes; the rest is zero.
inline Vector load(const float* from, int64_t n) {
  if (n >= kLanes) return load(from);
  Vector x = {};
  std::memcpy(&x, from, n * sizeof(float));
  return x;
}

inline void store(float* to, Vector x, int64_t n) {
  if (n >= kLanes) return store(to, x);
  std::memcpy(to, &x, n * sizeof(float));
}

inline Vector filled(float number) { return number - Vector{}; }

inline float sum(Vector x) {
  float total = 0;
  for (int lane = 0; lane < kLanes; lane++) total += x[lane];
  return total;
}

// e^x to about one unit in the last place; x is clamped to where that is a normal number.
inline Vector exponential(Vector x) {
  x = x > filled(88.0f) ? filled(88.0f) : x;
  x = x < filled(-87.0f) ? filled(-87.0f) : x;
  const Vector shift = filled(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Vector power = (x * filled(1.44269504f) + shift) - shift;
  // ln 2 in two parts, so that the rest is exact.
  const Vector rest = (x - power * filled(0.693359375f)) + power * filled(2.12194440e-4f);
  Vector sum = filled(1.0f / 5040);  // Taylor; |rest| <= ln 2 / 2
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
    sum = sum * rest + filled(term);
  const Integers exponent = (__builtin_convertvector(power, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return sum * scale;
}

inline Vector sigmoid(Vector x) { return filled(1.0f) / (filled(1.0f) + exponential(-x)); }

// Where lane i of a shuffled pair comes from: of rows `step` apart, in which blocks of `step`
// numbers change places, the low or the high one afterwards.
constexpr int low(int i, int step) { return i & step ? kLanes + i - step : i; }
constexpr int high(int i, int step) { return i & step ? kLanes + i : i + step; }

template <int step, int... i>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, i...>) {
#if defined(__clang__)
  const Vector first = __builtin_shufflevector(a, b, low(i, step)...);
  b = __builtin_shufflevector(a, b, high(i, step)...);
#else
  const Vector first = __builtin_shuffle(a, b, Integers{low(i, step)...});
  b = __builtin_shuffle(a, b, Integers{high(i, step)...});
#endif
  a = first;
}

template <int step>
inline void exchange_all(Vector* rows) {
  for (int i = 0; i < kLanes; i++)
    if (!(i & step))
      exchange<step>(rows[i], rows[i + step], std::make_integer_sequence<int, kLanes>());
  if constexpr (step > 1) exchange_all<step / 2>(rows);
}

// A square of kLanes x kLanes numbers, mirrored at its diagonal.
inline void transpose(Vector* rows) { exchange_all<kLanes / 2>(rows); }

}  // namespace dynmoe
