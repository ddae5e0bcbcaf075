// Memory of a thread between two calls of a kernel.

#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dynmoe {

// Grows to the most that was ever asked for, and starts where a vector may.
class Memory {
 public:
  float* hold(int64_t numbers) {
    if (numbers > size_) {
      numbers_.reset(static_cast<float*>(operator new[](numbers * sizeof(float), kAlignment)));
      size_ = numbers;
    }
    return numbers_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(float* numbers) const { operator delete[](numbers, kAlignment); }
  };
  std::unique_ptr<float[], Free> numbers_;
  int64_t size_ = 0;
};

}  // namespace dynmoe
