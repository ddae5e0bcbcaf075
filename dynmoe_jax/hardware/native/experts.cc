// Dropless SwiGLU experts in float32: forward, and the gradients of everything.
//
// Rows come sorted by expert.  They are worked on in waves of a few thousand, so that what lies
// between two products stays small whatever the static bound of rows is; within a wave one phase
// follows the other, each a list of independent tasks.  No two tasks of a phase write to the same
// place and sums are in an order of their own, so results do not depend on the number of threads.
//
// T tokens, R rows, N layers, S rows whose gate and up activations are kept, E experts, D width, F
// hidden width, W rows of a wave.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <vector>

#include "product.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace dynmoe {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kRowsOfGather = 128;
constexpr int64_t kFewColumns = 64;  // the least that a task has

// [i * size, (i + 1) * size) within [0, n)
struct Block {
  int64_t begin, size;
  Block(int64_t i, int64_t n, int64_t size) : begin(i * size), size(std::min(size, n - i * size)) {}
};

// Rows of a wave, from `begin` on, that belong to one expert.
struct Piece {
  int64_t expert, begin, rows;
  bool first;  // of the expert's rows: weight gradients start here
};

struct Wave {
  int64_t begin = 0, rows = 0;
  std::vector<Piece> pieces;
};

// Experts stay whole where they fit.  No wave crosses row `saved`.
std::vector<Wave> waves(const int32_t* group_size, int64_t experts, int64_t most, int64_t saved) {
  std::vector<Wave> all;
  Wave wave;
  const auto finish = [&] {
    if (wave.rows) all.push_back(wave);
    wave = {wave.begin + wave.rows, 0, {}};
  };
  for (int64_t expert = 0; expert < experts; expert++) {
    bool first = true;
    for (int64_t rest = group_size[expert]; rest > 0; first = false) {
      const int64_t begin = wave.begin + wave.rows;
      if (begin == saved || wave.rows == most || (rest <= most && wave.rows + rest > most))
        finish();
      const int64_t until_saved = begin < saved ? saved - begin : rest;
      const int64_t rows = std::min({rest, most - wave.rows, until_saved});
      wave.pieces.push_back({expert, wave.rows, rows, first});
      wave.rows += rows;
      rest -= rows;
    }
  }
  finish();
  return all;
}

// What is computed for some rows, a block of columns at a time.
struct Work {
  int64_t columns;
  std::function<void(const Piece&, const Block&)> task;
};

// The operands that both directions have.
struct Experts {
  ffi::ThreadPool& pool;
  const float* x;             // [T, D]
  const int32_t* token;       // [R]
  const float* weight;        // [R]
  const int32_t* group_size;  // [E]
  const float* gate_up;       // [E, D, 2F]
  const float* down;          // [E, F, D]
  int64_t width, hidden, experts;

  const float* gate_up_of(const Piece& p) const { return gate_up + p.expert * width * 2 * hidden; }
  const float* down_of(const Piece& p) const { return down + p.expert * hidden * width; }

  // All works of one phase: each for every piece of a wave and every block of its columns.
  void for_each_block(const Wave& wave, std::initializer_list<Work> works) const {
    const int64_t pieces = wave.pieces.size();
    const auto count = [&](int64_t size) {
      int64_t tasks = 0;
      for (const Work& work : works) tasks += pieces * blocks(work.columns, size);
      return tasks;
    };
    int64_t size = kColumnsOfTask;
    while (size > kFewColumns && count(size) < kTasksOfThread * pool.num_threads()) size /= 2;
    for_each_task(pool, count(size), [&](int64_t i) {
      for (const Work& work : works) {
        const int64_t per_piece = blocks(work.columns, size);
        if (i < pieces * per_piece)
          return work.task(wave.pieces[i / per_piece], Block(i % per_piece, work.columns, size));
        i -= pieces * per_piece;
      }
    });
  }

  // to[W, D] = the tokens of the rows of a wave
  void gather(const Wave& wave, const float* from, float* to) const {
    for_each_task(pool, blocks(wave.rows, kRowsOfGather), [&](int64_t i) {
      const Block block(i, wave.rows, kRowsOfGather);
      for (int64_t r = block.begin; r < block.begin + block.size; r++)
        std::memcpy(to + r * width, from + token[wave.begin + r] * width, width * sizeof(float));
    });
  }

  // to[T, D] += the rows of a wave, times `factor` if there is one
  void scatter_add(const Wave& wave, const float* from, const float* factor, float* to) const {
    for_each_task(pool, blocks(width, kFewColumns), [&](int64_t i) {
      const Block block(i, width, kFewColumns);
      for (int64_t r = 0; r < wave.rows; r++) {
        const Vector times = filled(factor ? factor[wave.begin + r] : 1.0f);
        const float* row = from + r * width + block.begin;
        float* sum = to + token[wave.begin + r] * width + block.begin;
        for (int64_t j = 0; j < block.size; j += kLanes) {
          const int64_t n = block.size - j;
          store(sum + j, load(sum + j, n) + times * load(row + j, n), n);
        }
      }
    });
  }

  // Gate and up activations of hidden units, to[rows, 2F].
  void times_gate_up(const Piece& piece, const Block& block, const float* rows, float* to) const {
    for (int64_t half : {int64_t{0}, hidden}) {
      const Plain matrix{gate_up_of(piece) + half + block.begin, 2 * hidden};
      product(piece.rows, block.size, width, Plain{rows, width}, matrix, to + half + block.begin,
              2 * hidden, false);
    }
  }
};

// Where the parts of a wave lie in a scratch array of [W, ...].
struct Scratch {
  float* next;
  int64_t columns, rows;

  bool holds(int64_t needed) const { return columns == needed && rows > 0; }

  float* take(int64_t columns) {
    float* taken = next;
    next += rows * columns;
    return taken;
  }
};

int64_t forward_columns(const Experts& e) { return e.width + 3 * e.hidden; }

void forward(const Experts& e, int64_t saved, Scratch scratch, float* y, float* kept) {
  const int64_t D = e.width, F = e.hidden;
  float* rows = scratch.take(D);
  float* hidden = scratch.take(F);
  float* unsaved = scratch.take(2 * F);
  for (const Wave& wave : waves(e.group_size, e.experts, scratch.rows, saved)) {
    float* gate_up = wave.begin < saved ? kept + wave.begin * 2 * F : unsaved;
    e.gather(wave, e.x, rows);
    const auto activate = [&](const Piece& piece, const Block& block) {
      e.times_gate_up(piece, block, rows + piece.begin * D, gate_up + piece.begin * 2 * F);
      for (int64_t r = piece.begin; r < piece.begin + piece.rows; r++)
        for (int64_t f = block.begin; f < block.begin + block.size; f += kLanes) {
          const int64_t n = block.begin + block.size - f;
          const Vector gate = load(gate_up + r * 2 * F + f, n);
          const Vector up = load(gate_up + r * 2 * F + F + f, n);
          store(hidden + r * F + f, gate * sigmoid(gate) * up, n);
        }
    };
    e.for_each_block(wave, {{F, activate}});
    const auto project_down = [&](const Piece& piece, const Block& block) {
      const Plain matrix{e.down_of(piece) + block.begin, D};
      product(piece.rows, block.size, F, Plain{hidden + piece.begin * F, F}, matrix,
              rows + piece.begin * D + block.begin, D, false);
    };
    e.for_each_block(wave, {{D, project_down}});
    e.scatter_add(wave, rows, e.weight, y);
  }
}

struct Gradients {
  float* x;        // [T, D]
  float* weight;   // [R]
  float* gate_up;  // [E, D, 2F]
  float* down;     // [E, F, D]
};

// Hidden units of a row: from the gradient of what down returns, which stands where that of up
// goes, all gradients; and the activations times the row's weight.  Returns the weight's gradient.
float swiglu_gradient(int64_t units, float weight, const float* gate_, const float* up_,
                      float* dgate, float* dup, float* hidden) {
  Vector dweight = {};
  for (int64_t f = 0; f < units; f += kLanes) {
    const int64_t n = units - f;
    const Vector gate = load(gate_ + f, n), up = load(up_ + f, n), dhidden = load(dup + f, n);
    const Vector s = sigmoid(gate), silu = gate * s, weighted = dhidden * filled(weight);
    dweight += dhidden * silu * up;
    store(hidden + f, silu * up * filled(weight), n);
    store(dgate + f, weighted * up * (s + silu * (filled(1.0f) - s)), n);
    store(dup + f, weighted * silu, n);
  }
  return sum(dweight);
}

int64_t backward_columns(const Experts& e) {
  return 3 * e.width + 5 * e.hidden + blocks(e.hidden, kFewColumns);
}

void backward(const Experts& e, int64_t saved, Scratch scratch, const float* dy, const float* kept,
              const Gradients& gradient) {
  const int64_t D = e.width, F = e.hidden;
  float* rows = scratch.take(D);
  float* drows = scratch.take(D);  // of y
  float* dx = scratch.take(D);
  float* hidden = scratch.take(F);
  float* dgate_up = scratch.take(2 * F);
  float* dweight = scratch.take(blocks(F, kFewColumns));
  float* unsaved = scratch.take(2 * F);
  for (const Wave& wave : waves(e.group_size, e.experts, scratch.rows, saved)) {
    const bool is_saved = wave.begin < saved;
    const float* gate_up = is_saved ? kept + wave.begin * 2 * F : unsaved;
    e.gather(wave, e.x, rows);
    e.gather(wave, dy, drows);
    const auto differentiate = [&](const Piece& piece, const Block& block) {
      if (!is_saved)
        e.times_gate_up(piece, block, rows + piece.begin * D, unsaved + piece.begin * 2 * F);
      const Turned matrix{e.down_of(piece) + block.begin * D, D};
      product(piece.rows, block.size, D, Plain{drows + piece.begin * D, D}, matrix,
              dgate_up + piece.begin * 2 * F + F + block.begin, 2 * F, false);
      // <dy, hidden down> = <dy down^T, hidden>: a row's weight needs no product of its own.
      // Its sums are of as many columns whatever a task has.
      for (int64_t r = piece.begin; r < piece.begin + piece.rows; r++)
        for (int64_t f = block.begin; f < block.begin + block.size; f += kFewColumns) {
          const int64_t units = std::min(kFewColumns, F - f), gate = r * 2 * F + f, up = gate + F;
          dweight[f / kFewColumns * scratch.rows + r] =
              swiglu_gradient(units, e.weight[wave.begin + r], gate_up + gate, gate_up + up,
                              dgate_up + gate, dgate_up + up, hidden + r * F + f);
        }
    };
    e.for_each_block(wave, {{F, differentiate}});
    const auto of_rows = [&](const Piece& piece, const Block& block) {
      const Turned matrix{e.gate_up_of(piece) + block.begin * 2 * F, 2 * F};
      product(piece.rows, block.size, 2 * F, Plain{dgate_up + piece.begin * 2 * F, 2 * F}, matrix,
              dx + piece.begin * D + block.begin, D, false);
    };
    const auto of_down = [&](const Piece& piece, const Block& block) {
      product(F, block.size, piece.rows, Turned{hidden + piece.begin * F, F},
              Plain{drows + piece.begin * D + block.begin, D},
              gradient.down + piece.expert * F * D + block.begin, D, !piece.first);
    };
    const auto of_gate_up = [&](const Piece& piece, const Block& block) {
      product(D, block.size, piece.rows, Turned{rows + piece.begin * D, D},
              Plain{dgate_up + piece.begin * 2 * F + block.begin, 2 * F},
              gradient.gate_up + piece.expert * D * 2 * F + block.begin, 2 * F, !piece.first);
    };
    // In one phase, the longest tasks first: fewer threads wait at its end.
    e.for_each_block(wave, {{D, of_rows}, {D, of_down}, {2 * F, of_gate_up}});
    e.scatter_add(wave, dx, nullptr, gradient.x);
    for (int64_t r = 0; r < wave.rows; r++) {
      float sum = 0;
      for (int64_t b = 0; b < blocks(F, kFewColumns); b++) sum += dweight[b * scratch.rows + r];
      gradient.weight[wave.begin + r] = sum;
    }
  }
}

using Floats = ffi::Buffer<ffi::F32>;
using Numbers = ffi::Buffer<ffi::S32>;
using Number = ffi::BufferR0<ffi::S32>;
using Result = ffi::Result<Floats>;

Scratch scratch_of(Result& array) {
  return {array->typed_data(), array->dimensions()[0], array->dimensions()[1]};
}

ffi::Error wrong_scratch() {
  return ffi::Error::InvalidArgument("The scratch array has another number of columns.");
}

void clear(Result& array) { std::memset(array->typed_data(), 0, array->size_bytes()); }

// gate_up [N, E, D, 2F] and down [N, E, F, D] are those of all layers.
Experts experts_of(ffi::ThreadPool& pool, Floats& x, Numbers& token, Floats& weight,
                   Numbers& group_size, Floats& gate_up, Floats& down, Number& layer) {
  const auto shape = down.dimensions();  // [N, E, F, D]
  const int64_t before = layer.typed_data()[0] * shape[1] * shape[2] * shape[3];
  return {pool,
          x.typed_data(),
          token.typed_data(),
          weight.typed_data(),
          group_size.typed_data(),
          gate_up.typed_data() + 2 * before,
          down.typed_data() + before,
          shape[3],
          shape[2],
          shape[1]};
}

ffi::Error forward_handler(ffi::ThreadPool pool, Floats x, Numbers token, Floats weight,
                           Numbers group_size, Floats gate_up, Floats down, Number layer, Result y,
                           Result kept, Result scratch) {
  const Experts experts = experts_of(pool, x, token, weight, group_size, gate_up, down, layer);
  const Scratch space = scratch_of(scratch);
  if (!space.holds(forward_columns(experts))) return wrong_scratch();
  clear(y);
  forward(experts, kept->dimensions()[0], space, y->typed_data(), kept->typed_data());
  return ffi::Error::Success();
}

ffi::Error backward_handler(ffi::ThreadPool pool, Floats x, Numbers token, Floats weight,
                            Numbers group_size, Floats gate_up, Floats down, Number layer,
                            Floats kept, Floats dy, Result dx, Result dweight, Result dgate_up,
                            Result ddown, Result scratch) {
  const Experts experts = experts_of(pool, x, token, weight, group_size, gate_up, down, layer);
  const Scratch space = scratch_of(scratch);
  if (!space.holds(backward_columns(experts))) return wrong_scratch();
  clear(dx);
  clear(dweight);
  const Gradients gradients{dx->typed_data(), dweight->typed_data(), dgate_up->typed_data(),
                            ddown->typed_data()};
  // Experts without rows; the others are written.
  for (int64_t expert = 0; expert < experts.experts; expert++)
    if (experts.group_size[expert] == 0) {
      const int64_t matrix = experts.width * experts.hidden;
      std::memset(gradients.gate_up + expert * 2 * matrix, 0, 2 * matrix * sizeof(float));
      std::memset(gradients.down + expert * matrix, 0, matrix * sizeof(float));
    }
  backward(experts, kept.dimensions()[0], space, dy.typed_data(), kept.typed_data(), gradients);
  return ffi::Error::Success();
}

auto operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Floats>()   // x
      .Arg<Numbers>()  // token
      .Arg<Floats>()   // weight
      .Arg<Numbers>()  // group_size
      .Arg<Floats>()   // gate_up
      .Arg<Floats>()   // down
      .Arg<Number>();  // layer
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynmoe_experts, forward_handler,
                              operands()
                                  .Ret<Floats>()    // y
                                  .Ret<Floats>()    // kept
                                  .Ret<Floats>());  // scratch

XLA_FFI_DEFINE_HANDLER_SYMBOL(dynmoe_experts_gradient, backward_handler,
                              operands()
                                  .Arg<Floats>()    // kept
                                  .Arg<Floats>()    // dy
                                  .Ret<Floats>()    // dx
                                  .Ret<Floats>()    // dweight
                                  .Ret<Floats>()    // dgate_up
                                  .Ret<Floats>()    // ddown
                                  .Ret<Floats>());  // scratch

}  // namespace dynmoe
