// Products of all kinds of sides and sizes against sums in double; prints what is wrong.

#include "product.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

using dynmoe::Side;

constexpr int64_t kBeside = 3;  // numbers between two lines of memory, which nothing may touch
constexpr float kUntouched = 1e30f;

template <bool kTurned>
struct Matrix {
  int64_t rows, columns, stride = (kTurned ? rows : columns) + kBeside;
  std::vector<float> numbers = std::vector<float>((kTurned ? columns : rows) * stride, kUntouched);

  float& at(int64_t i, int64_t j) { return numbers[kTurned ? j * stride + i : i * stride + j]; }
  Side<kTurned> side() const { return {numbers.data(), stride}; }
};

// The largest error, in roundings of the sum of what is added without signs.
template <bool kATurned, bool kBTurned>
double error(int64_t rows, int64_t columns, int64_t depth, bool add) {
  std::mt19937 random(static_cast<uint32_t>(rows * 1000003 + columns * 1009 + depth));
  std::normal_distribution<float> normal;
  std::uniform_real_distribution<float> power(-20, 20);
  Matrix<kATurned> a{rows, depth};
  Matrix<kBTurned> b{depth, columns};
  Matrix<false> c{rows, columns};
  // Lines of very different size: nothing small is lost beside something large.
  for (int64_t i = 0; i < rows; i++) {
    const float scale = std::exp2(power(random));
    for (int64_t k = 0; k < depth; k++) a.at(i, k) = scale * normal(random);
    for (int64_t j = 0; j < columns; j++) c.at(i, j) = scale * normal(random);
  }
  for (int64_t k = 0; k < depth; k++)
    for (int64_t j = 0; j < columns; j++) b.at(k, j) = normal(random);
  Matrix<false> before = c;
  dynmoe::product(rows, columns, depth, a.side(), b.side(), c.numbers.data(), c.stride, add);
  double worst = 0;
  for (int64_t i = 0; i < rows; i++) {
    for (int64_t j = 0; j < columns; j++) {
      double sum = add ? before.at(i, j) : 0, size = std::abs(sum);
      for (int64_t k = 0; k < depth; k++) {
        const double term = static_cast<double>(a.at(i, k)) * b.at(k, j);
        sum += term;
        size += std::abs(term);
      }
      const double difference = std::abs(c.at(i, j) - sum);
      if (!(difference <= worst * size * 0x1p-24)) worst = difference / size * 0x1p24;
      if (std::isnan(difference)) return difference;
    }
    for (int64_t j = columns; j < c.stride; j++)
      if (c.at(i, j) != kUntouched) return std::numeric_limits<double>::infinity();
  }
  return worst;
}

constexpr int64_t kSizes[][3] = {
    {1, 1, 1},      {1, 300, 7},   {8, 33, 5},       {9, 17, 33},    {24, 31, 32},
    {25, 32, 31},   {32, 32, 32},  {33, 16, 64},     {47, 48, 300},  {48, 40, 17},
    {64, 1, 512},   {100, 257, 1}, {128, 256, 2},    {129, 65, 513}, {240, 272, 31},
    {300, 511, 96}, {31, 530, 90}, {224, 100, 1100}, {70, 530, 200},
};

template <bool kATurned, bool kBTurned>
bool right() {
  bool all = true;
  for (const auto& [rows, columns, depth] : kSizes)
    for (bool add : {false, true}) {
      const double roundings = error<kATurned, kBTurned>(rows, columns, depth, add);
      if (roundings <= 12) continue;
      std::printf("rows %d columns %d depth %d turned %d %d add %d: %g roundings\n", int(rows),
                  int(columns), int(depth), kATurned, kBTurned, add, roundings);
      all = false;
    }
  return all;
}

}  // namespace

int main() {
  const bool results[] = {right<false, false>(), right<false, true>(), right<true, false>(),
                          right<true, true>()};
  for (bool result : results)
    if (!result) return 1;
#if DYNMOE_AMX
  std::puts(dynmoe::may_use_amx() ? "right, with AMX" : "right, AMX refused");
#else
  std::puts("right, by vectors");
#endif
}
