#include "narrow.h"
#include "needs.h"
#include "pairs.h"

namespace fastbp::cpu {

namespace {

// One panel of rows through all layers backward.
class BackwardPanel {
 public:
  BackwardPanel(const Call& call, const Needs& needs, const PairedWeights* forward, const PairedWeights& backward,
                const Sums<float>& sums, const Sums<float>::Set& own, Scratch& scratch)
      : call_(call),
        needs_(needs),
        forward_(forward),
        backward_(backward),
        sums_(sums),
        own_(own),
        space_(call, scratch),
        h_room_(space_.words()),
        c_(call.settings.gated ? space_.floats() : nullptr) {}

  void run(int64_t r, int64_t rows, const Rows& dy, const Out& dx) {
    Words x;
    if (call_.x.any()) x = words_of(call_.x, r, rows, space_.words(), space_.room);
    const std::vector<Words> kept = keep(r, rows, x);
    Word* dh_room = space_.words();
    Word* dz_room[2] = {space_.words(), call_.settings.gated ? space_.words() : nullptr};
    Words d = words_of(dy, r, rows, space_.words(), space_.room);  // not dh_room, which a product of it fills
    for (int64_t layer = call_.layers() - 1; layer >= 0; --layer) {
      const int64_t first = call_.first(layer), in = call_.weights[first].in;
      Words dz[2] = {d, {}};
      if (layer < call_.hidden()) slope(layer, r, rows, d, kept, dz_room, dz);
      add_up(layer, rows, dz, x, kept);
      if (!needs_.below(layer)) return;
      const bool two = call_.parts(layer) == 2;
      if (two) backward_.multiply(first, rows, dz[0], c_, space_.room);
      Word* const to = layer == 0 ? word_at(dx, r) : dh_room;
      d = {to, layer > 0 && in % 2 ? space_.room : in};
      backward_.multiply(first + two, rows, dz[two], to, d.stride, two ? c_ : nullptr, space_.room);
      if (layer == 0) return;
    }
  }

 private:
  // What every hidden linear kept: where it lies, or computed again.
  std::vector<Words> keep(int64_t r, int64_t rows, Words x) {
    std::vector<Words> kept;
    Words h = x;
    for (int64_t i = 0; i < call_.hidden() * call_.width(); ++i) {
      kept.emplace_back();
      if (!forward_) {
        if (call_.residuals[i].any()) {
          kept[i] = words_of(call_.residuals[i], r, rows, space_.words(), space_.room);
        }
        continue;
      }
      if (!call_.replays(i)) continue;
      if (i > 0 && !call_.settings.gated) {
        output(call_, rows, call_.weights[i].in, &kept[i - 1], h_room_, space_.room);
        h = {h_room_, space_.room};
      }
      Word* z = space_.words();
      forward_->multiply(i, rows, h, z, space_.room);
      kept[i] = {z, space_.room};
    }
    return kept;
  }

  void slope(int64_t layer, int64_t r, int64_t rows, Words d, const std::vector<Words>& kept, Word* const* room,
             Words* dz) {
    const int64_t first = call_.first(layer), n = call_.weights[first].out;
    for (int part = 0; part < call_.width(); ++part) {
      dz[part] = needs_.slope(first + part) ? Words{room[part], space_.room} : Words{};
    }
    if (call_.settings.from_side()) {
      const auto grad = call_.compressed().grad[call_.settings.activation];
      for (int64_t i = 0; i < rows; ++i) {
        Word* to = room[0] + i * space_.room;
        grad(n, d.data + i * d.stride, kept[first].data + i * kept[first].stride, call_.bits_at(layer, r + i, 0), to);
        if (n % 2) to[n] = 0;
      }
      return;
    }
    if (!call_.settings.gated) {
      const auto grad = call_.grad_of(loops());
      const Words& z = kept[first];
      if (n % 2 == 0 && d.stride == n && (!z.data || z.stride == n)) {  // one long row
        dz[0].stride = n;
        return grad(rows * n, d.data, z.data ? z.data : d.data, room[0], call_.settings.params);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const Word* dh = d.data + i * d.stride;
        const Word* z = kept[first].data ? kept[first].data + i * kept[first].stride : dh;
        grad(n, dh, z, room[0] + i * space_.room, call_.settings.params);
        if (n % 2) room[0][i * space_.room + n] = 0;
      }
      return;
    }
    const auto grad = loops().gated_grad[call_.settings.activation];
    const Words &g = kept[first], &u = kept[first + 1];
    const auto at = [](auto words, int64_t i) { return words.data ? words.data + i * words.stride : nullptr; };
    for (int64_t i = 0; i < rows; ++i) {
      Word* to[2] = {nullptr, nullptr};
      for (int part = 0; part < 2; ++part) {
        if (!dz[part].data) continue;
        to[part] = room[part] + i * space_.room;
        to[part][n] = 0;  // for n odd; else it lies in the gap between rows
      }
      grad(n, at(d, i), at(g, i), at(u, i), to[0], to[1], call_.settings.params);
    }
  }

  // dW += dzᵀ h and db += Σ dz of the linears of a layer.
  void add_up(int64_t layer, int64_t rows, const Words* dz, Words x, const std::vector<Words>& kept) {
    const auto& k = kernels<float>();
    const int64_t first = call_.first(layer), in = call_.weights[first].in, pairs = (rows + 1) / 2;
    Scratch scratch;
    float* h = nullptr;
    for (int part = 0; part < call_.parts(layer); ++part) {
      const int64_t linear = first + part, n = call_.weights[linear].out;
      if (needs_.bias(linear)) loops().add_rows(rows, n, dz[part].data, dz[part].stride, sums_.bias(own_, linear));
      if (!needs_.weight(linear)) continue;
      if (!h) {
        h = scratch.take<float>(pairs * space_.room);
        pair_up(rows, in, input(layer, rows, in, x, kept), h, space_.room);
      }
      float* d = scratch.take<float>(pairs * n);
      pair_up(rows, n, dz[part], d, n);
      k.multiply_pairs({n, in, pairs, d, n, true, k.tile_rows, h, space_.room, k.tile_columns,
                        sums_.weight(own_, linear), in, nullptr, true});
    }
  }

  static void pair_up(int64_t rows, int64_t n, Words from, float* to, int64_t to_stride) {
    for (int64_t i = 0; i < rows; i += 2) {
      const Word* even = from.data + i * from.stride;
      kernels<float>().pair_rows(n, even, i + 1 < rows ? even + from.stride : nullptr, to + i / 2 * to_stride);
    }
  }

  // The input of a layer.
  Words input(int64_t layer, int64_t rows, int64_t in, Words x, const std::vector<Words>& kept) {
    if (layer == 0) return x;
    const int64_t below = call_.first(layer - 1);
    if (call_.settings.from_output()) return kept[below];
    output(call_, rows, in, &kept[below], h_room_, space_.room);
    return {h_room_, space_.room};
  }

  const Call& call_;
  const Needs& needs_;
  const PairedWeights* forward_;
  const PairedWeights& backward_;
  const Sums<float>& sums_;
  const Sums<float>::Set& own_;
  Space space_;
  Word* h_room_;
  float* c_;  // the first half of a gated layer's dx
};

}  // namespace

std::vector<Maybe> backward_narrow_pairs(Call& call, const Tensor& dy, const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  std::vector<Maybe> grads(wanted.size());
  const Out dx = make_dx(call, wanted, grads);
  Scratch shared;
  std::optional<PairedWeights> forward;
  if (call.settings.save == Save::recompute) forward.emplace(call, true, shared);
  const PairedWeights backward(call, false, shared);
  const Sums<float> sums(call, wanted, 2 * call.work(), shared);
  const Rows dy_rows(dy);
  sums.for_panels([&](const Sums<float>::Set& own, int64_t r, int64_t rows) {
    Scratch scratch;
    BackwardPanel(call, needs, forward ? &*forward : nullptr, backward, sums, own, scratch).run(r, rows, dy_rows, dx);
  });
  sums.finish(grads);
  return grads;
}

}  // namespace fastbp::cpu
