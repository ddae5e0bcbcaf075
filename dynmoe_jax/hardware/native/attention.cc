// Causal attention within segments in float32, and its gradients: FlashAttention (arXiv
// 2205.14135) for a CPU.
//
// A tile of queries meets the keys from the first of its segments on up to its own end.  Scores are
// held keys by queries: products then read keys and values as they lie, and a vector of queries
// goes through the softmax together.  Backward recomputes probabilities from the log-sum-exp of
// each query.
//
// B batch, L positions, H query heads, G key/value heads, W head width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "memory.h"
#include "product.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace dynmoe {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTile = 64;  // queries: several vectors
static_assert(kTile % kLanes == 0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Shape {
  int64_t batch, length, heads, groups, width;

  int64_t tiles() const { return (length + kTile - 1) / kTile; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }

  // The first position of a head; the next one follows after `stride`.
  int64_t query(int64_t b, int64_t h) const { return (b * length * heads + h) * width; }
  int64_t key(int64_t b, int64_t g) const { return (b * length * groups + g) * width; }
  int64_t query_stride() const { return heads * width; }
  int64_t key_stride() const { return groups * width; }
};

// Which keys the queries of each tile may meet.
class Segments {
 public:
  Segments(const int32_t* ids, const Shape& shape)
      : ids_(ids), length_(shape.length), first_(shape.batch * shape.length) {
    for (int64_t b = 0; b < shape.batch; b++) {
      const int32_t* id = ids + b * length_;
      for (int64_t i = 0; i < length_; i++) {
        // Usually the segment of the position before; else any earlier one, or a new one.
        int64_t same = i - 1;
        while (same >= 0 && id[same] != id[i]) same--;
        first_[b * length_ + i] = same < 0 ? i : first_[b * length_ + same];
      }
    }
  }

  int64_t first_key(int64_t b, int64_t begin, int64_t end) const {
    const auto row = first_.begin() + b * length_;
    return *std::min_element(row + begin, row + end);
  }

  const int32_t* ids(int64_t b) const { return ids_ + b * length_; }

 private:
  const int32_t* ids_;
  int64_t length_;
  std::vector<int64_t> first_;
};

// Some queries of one sequence and the keys that they may meet.
struct Tile {
  int64_t key, query, end;  // keys [key, end), queries [query, end)
  const int32_t* ids;
  Integers id[kTile / kLanes], position[kTile / kLanes];

  Tile(const Segments& segments, int64_t b, int64_t i, const Shape& shape)
      : query(i * kTile), end(std::min(query + kTile, shape.length)), ids(segments.ids(b)) {
    key = segments.first_key(b, query, end);
    for (int64_t q = 0; q < kTile; q++) {
      id[q / kLanes][q % kLanes] = ids[std::min(query + q, end - 1)];
      position[q / kLanes][q % kLanes] = query + q;
    }
  }

  int64_t keys() const { return end - key; }
  int64_t queries() const { return end - query; }

  // All ones where query vector v attends to key k of the tile.
  Integers mask(int64_t k, int64_t v) const {
    const int32_t at = key + k;
    return (id[v] == ids[at]) & (position[v] >= at);
  }
};

Vector where(Integers mask, Vector x, float other) { return mask ? x : filled(other); }

// Two arrays of scores [keys, kTile] that belong to the thread.
struct Scores {
  float *first, *second;

  explicit Scores(int64_t keys) {
    thread_local Memory memory[2];
    first = memory[0].hold(keys * kTile);
    second = memory[1].hold(keys * kTile);
  }
};

// scores[keys, kTile] become odds: their exponentials, relative to the greatest of each query.
void softmax(const Tile& tile, float scale, float* scores, float* sum, float* log_sum) {
  for (int64_t v = 0; v < kTile / kLanes; v++) {
    Vector most = filled(-kInfinity), total = {};
    for (int64_t k = 0; k < tile.keys(); k++) {
      float* at = scores + k * kTile + v * kLanes;
      const Vector score = where(tile.mask(k, v), load(at) * filled(scale), -kInfinity);
      most = score > most ? score : most;
      store(at, score);
    }
    for (int64_t k = 0; k < tile.keys(); k++) {
      float* at = scores + k * kTile + v * kLanes;
      const Vector odds = where(tile.mask(k, v), exponential(load(at) - most), 0.0f);
      total += odds;
      store(at, odds);
    }
    store(sum + v * kLanes, total);
    for (int64_t q = v * kLanes; q < std::min<int64_t>((v + 1) * kLanes, tile.queries()); q++)
      log_sum[q] = most[q - v * kLanes] + std::log(sum[q]);
  }
}

void forward(ffi::ThreadPool& pool, const Shape& s, const float* query, const float* key,
             const float* value, const Segments& segments, float* mixed, float* log_sum) {
  const int64_t q_stride = s.query_stride(), k_stride = s.key_stride();
  for_each_task(pool, s.batch * s.heads, [&](int64_t task) {
    const int64_t b = task / s.heads, h = task % s.heads, g = h / (s.heads / s.groups);
    for (int64_t i = 0; i < s.tiles(); i++) {
      const Tile tile(segments, b, i, s);
      const int64_t queries = tile.queries(), keys = tile.keys();
      const int64_t at_query = s.query(b, h) + tile.query * q_stride;
      const int64_t at_key = s.key(b, g) + tile.key * k_stride;
      float* scores = Scores(keys).first;
      float sum[kTile];
      product(keys, queries, s.width, Plain{key + at_key, k_stride},
              Turned{query + at_query, q_stride}, scores, kTile, false);
      softmax(tile, s.scale(), scores, sum, log_sum + task * s.length + tile.query);
      float* to = mixed + at_query;
      product(queries, s.width, keys, Turned{scores, kTile}, Plain{value + at_key, k_stride}, to,
              q_stride, false);
      for (int64_t q = 0; q < queries; q++)
        for (int64_t w = 0; w < s.width; w++) to[q * q_stride + w] /= sum[q];
    }
  });
}

// scores[keys, kTile] become probabilities, dprobs the gradients of scores.
void softmax_gradient(const Tile& tile, float scale, const float* log_sum, const float* delta,
                      float* scores, float* dprobs) {
  for (int64_t v = 0; v < kTile / kLanes; v++) {
    const int64_t rest = tile.queries() - v * kLanes;
    if (rest <= 0) break;
    const Vector log = load(log_sum + v * kLanes, rest), minus = load(delta + v * kLanes);
    for (int64_t k = 0; k < tile.keys(); k++) {
      const int64_t at = k * kTile + v * kLanes;
      const Vector score = load(scores + at) * filled(scale);
      const Vector prob = where(tile.mask(k, v), exponential(score - log), 0.0f);
      store(scores + at, prob);
      store(dprobs + at, prob * (load(dprobs + at) - minus) * filled(scale));
    }
  }
}

struct Gradients {
  float *query, *key, *value;
};

void backward(ffi::ThreadPool& pool, const Shape& s, const float* query, const float* key,
              const float* value, const Segments& segments, const float* mixed,
              const float* log_sum, const float* dmixed, const Gradients& gradient) {
  const int64_t q_stride = s.query_stride(), k_stride = s.key_stride();
  const int64_t shared = s.heads / s.groups;  // query heads of one key/value head
  for_each_task(pool, s.batch * s.groups, [&](int64_t task) {
    const int64_t b = task / s.groups, g = task % s.groups;
    for (float* of : {gradient.key, gradient.value})
      for (int64_t i = 0; i < s.length; i++)
        std::memset(of + s.key(b, g) + i * k_stride, 0, s.width * sizeof(float));
    for (int64_t i = 0; i < s.tiles() * shared; i++) {
      const int64_t h = g * shared + i / s.tiles();
      const Tile tile(segments, b, i % s.tiles(), s);
      const int64_t queries = tile.queries(), keys = tile.keys();
      const int64_t at_query = s.query(b, h) + tile.query * q_stride;
      const int64_t at_key = s.key(b, g) + tile.key * k_stride;
      const auto [probs, dscores] = Scores(keys);
      product(keys, queries, s.width, Plain{key + at_key, k_stride},
              Turned{query + at_query, q_stride}, probs, kTile, false);
      product(keys, queries, s.width, Plain{value + at_key, k_stride},
              Turned{dmixed + at_query, q_stride}, dscores, kTile, false);
      float delta[kTile] = {};  // <dprobs, probs> of a query is <dmixed, mixed>
      for (int64_t q = 0; q < queries; q++)
        for (int64_t w = 0; w < s.width; w++) {
          const int64_t at = at_query + q * q_stride + w;
          delta[q] += dmixed[at] * mixed[at];
        }
      const float* log = log_sum + (b * s.heads + h) * s.length + tile.query;
      softmax_gradient(tile, s.scale(), log, delta, probs, dscores);
      product(queries, s.width, keys, Turned{dscores, kTile}, Plain{key + at_key, k_stride},
              gradient.query + at_query, q_stride, false);
      product(keys, s.width, queries, Plain{dscores, kTile}, Plain{query + at_query, q_stride},
              gradient.key + at_key, k_stride, true);
      product(keys, s.width, queries, Plain{probs, kTile}, Plain{dmixed + at_query, q_stride},
              gradient.value + at_key, k_stride, true);
    }
  });
}

using Floats = ffi::Buffer<ffi::F32>;
using Numbers = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;

Shape shape_of(Floats& query, Floats& key) {
  const auto q = query.dimensions();
  return {q[0], q[1], q[2], key.dimensions()[2], q[3]};
}

ffi::Error forward_handler(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                           Numbers ids, Result mixed, Result log_sum) {
  const Shape shape = shape_of(query, key);
  forward(pool, shape, query.typed_data(), key.typed_data(), value.typed_data(),
          Segments(ids.typed_data(), shape), mixed->typed_data(), log_sum->typed_data());
  return ffi::Error::Success();
}

ffi::Error backward_handler(ffi::ThreadPool pool, Floats query, Floats key, Floats value,
                            Numbers ids, Floats mixed, Floats log_sum, Floats dmixed, Result dquery,
                            Result dkey, Result dvalue) {
  const Shape shape = shape_of(query, key);
  backward(pool, shape, query.typed_data(), key.typed_data(), value.typed_data(),
           Segments(ids.typed_data(), shape), mixed.typed_data(), log_sum.typed_data(),
           dmixed.typed_data(), {dquery->typed_data(), dkey->typed_data(), dvalue->typed_data()});
  return ffi::Error::Success();
}

auto operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()    // query [B, L, H, W]
      .Arg<Floats>()    // key [B, L, G, W]
      .Arg<Floats>()    // value [B, L, G, W]
      .Arg<Numbers>();  // segment ids [B, L]
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynmoe_attention, forward_handler,
                              operands()
                                  .Ret<Floats>()    // mixed [B, L, H, W]
                                  .Ret<Floats>());  // log-sum-exp [B, H, L]

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynmoe_attention_gradient, backward_handler,
                              operands()
                                  .Arg<Floats>()    // mixed
                                  .Arg<Floats>()    // log-sum-exp
                                  .Arg<Floats>()    // dmixed
                                  .Ret<Floats>()    // dquery
                                  .Ret<Floats>()    // dkey
                                  .Ret<Floats>());  // dvalue

}  // namespace dynmoe
