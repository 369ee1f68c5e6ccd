#include "narrow.h"
#include "needs.h"
#include "panels.h"
#include "parallel.h"

namespace fastbp::cpu {

namespace {

// One chunk of rows through all layers backward; what it finds of the weights' and biases' gradients it adds up itself.
template <class S>
class Chunk {
 public:
  Chunk(const Call& call, const Needs& needs, const Packed<S>* forward, const Packed<S>& backward, const Rows& dy,
        const Out& dx, const Sums<S>& sums, const typename Sums<S>::Set& own)
      : call_(call),
        needs_(needs),
        forward_(forward),
        backward_(backward),
        dy_(dy),
        dx_(dx),
        sums_(sums),
        own_(own),
        room_(round_up(widest(call), kernels<S>().tile_columns) + 16) {}

  void run(int64_t r, int64_t rows) {
    Scratch scratch;
    Panel<S> x;
    if (call_.x.any()) x = panel_of(call_.x, r, rows, scratch.take<S>(kPanel * room_), room_);
    const auto kept = keep(r, rows, x, scratch);
    Panel<S> d = panel_of(dy_, r, rows, scratch.take<S>(kPanel * room_), room_);
    S* dz_room[2] = {scratch.take<S>(kPanel * room_), call_.settings.gated ? scratch.take<S>(kPanel * room_) : nullptr};
    S* dh_room = scratch.take<S>(kPanel * room_);
    S* h_room = scratch.take<S>(kPanel * room_);
    for (int64_t layer = call_.layers() - 1; layer >= 0; --layer) {
      const int64_t first = call_.first(layer), n = call_.weights[first].out, in = call_.weights[first].in;
      Panel<S> dz[2] = {d, {}};
      if (layer < call_.hidden()) {
        S* parts[2] = {nullptr, nullptr};
        for (int part = 0; part < call_.width(); ++part) {
          if (needs_.slope(first + part)) parts[part] = dz_room[part];
        }
        const S* z[2] = {kept[first].data, call_.settings.gated ? kept[first + 1].data : nullptr};
        call_.slope(rows, n, d.data, d.stride, z, kept[first].stride, parts, n, call_.bits_at(layer, r, 0),
                    bits_size(n));
        for (int part = 0; part < 2; ++part) dz[part] = {parts[part], n};
      }
      add_up(layer, rows, dz, x, kept, h_room);
      if (!needs_.below(layer)) return;
      const bool straight = layer == 0 && kItemSize[static_cast<int>(call_.dtype)] == sizeof(S);
      S* to = straight ? static_cast<S*>(dx_.at(r, 0)) : dh_room;
      const int64_t stride = straight ? in : room_;
      for (int part = 0; part < call_.parts(layer); ++part) {
        backward_.multiply(first + part, rows, dz[part], to, stride, part > 0);
      }
      if (layer == 0 && !straight) dx_.write(r, rows, 0, in, to, stride);
      d = {to, stride};
      std::swap(dh_room, spare(dh_room, scratch));
    }
  }

 private:
  // dh of one layer is read while that of the next is written.
  S*& spare(S*, Scratch& scratch) {
    if (!spare_) spare_ = scratch.take<S>(kPanel * room_);
    return spare_;
  }

  // What every hidden linear kept: where it lies, or computed again.
  std::vector<Panel<S>> keep(int64_t r, int64_t rows, Panel<S> x, Scratch& scratch) {
    std::vector<Panel<S>> kept;
    Panel<S> h = x;
    for (int64_t i = 0; i < call_.hidden() * call_.width(); ++i) {
      if (!forward_) {
        const Rows& rows_kept = call_.residuals[i];
        kept.push_back(rows_kept.any() ? panel_of(rows_kept, r, rows, scratch.take<S>(kPanel * room_), room_)
                                       : Panel<S>{});
        continue;
      }
      if (!call_.replays(i)) {
        kept.emplace_back();
        continue;
      }
      if (i > 0 && !call_.settings.gated) {
        S* below = scratch.take<S>(kPanel * room_);
        const S* z[2] = {kept[i - 1].data, nullptr};
        call_.output(rows, call_.weights[i].in, z, kept[i - 1].stride, below, room_);
        h = {below, room_};
      }
      S* z = scratch.take<S>(kPanel * room_);
      forward_->multiply(i, rows, h, z, room_);
      for (int64_t row = 0; row < rows; ++row) call_.round(call_.weights[i].out, z + row * room_);
      kept.push_back({z, room_});
    }
    return kept;
  }

  // dW += dzᵀ h and db += Σ dz of the linears of a layer.
  void add_up(int64_t layer, int64_t rows, const Panel<S>* dz, Panel<S> x, const std::vector<Panel<S>>& kept,
              S* h_room) {
    const auto& k = kernels<S>();
    const int64_t first = call_.first(layer), in = call_.weights[first].in;
    Panel<S> h;
    for (int part = 0; part < call_.parts(layer); ++part) {
      const int64_t linear = first + part, n = call_.weights[linear].out;
      if (needs_.bias(linear)) {
        k.of[static_cast<int>(kDtypeOf<S>)].add_rows(rows, n, dz[part].data, dz[part].stride, sums_.bias(own_, linear));
      }
      if (!needs_.weight(linear)) continue;
      if (!h.data) h = input(layer, rows, in, x, kept, h_room);
      k.multiply({n, in, rows, dz[part].data, dz[part].stride, true, k.tile_rows, h.data, h.stride, k.tile_columns,
                  sums_.weight(own_, linear), in, nullptr, true});
    }
  }

  // The input of a layer, in rows that may be read up to a whole tile.
  Panel<S> input(int64_t layer, int64_t rows, int64_t in, Panel<S> x, const std::vector<Panel<S>>& kept, S* room) {
    const bool whole = in % kernels<S>().tile_columns == 0;
    if (layer > 0 && !call_.settings.from_output()) {
      const int64_t below = call_.first(layer - 1);
      const S* z[2] = {kept[below].data, call_.settings.gated ? kept[below + 1].data : nullptr};
      call_.output(rows, in, z, kept[below].stride, room, room_);
      return {room, room_};
    }
    const Panel<S> from = layer == 0 ? x : kept[call_.first(layer - 1)];
    if (whole || from.stride == room_) return from;
    for (int64_t i = 0; i < rows; ++i) std::copy_n(from.data + i * from.stride, in, room + i * room_);
    return {room, room_};
  }

  const Call& call_;
  const Needs& needs_;
  const Packed<S>* forward_;
  const Packed<S>& backward_;
  const Rows& dy_;
  const Out& dx_;
  const Sums<S>& sums_;
  const typename Sums<S>::Set& own_;
  int64_t room_;
  S* spare_ = nullptr;
};

}  // namespace

template <class S>
std::vector<Maybe> backward_narrow(Call& call, const Tensor& dy, const std::vector<bool>& wanted) {
  const Needs needs(call, wanted);
  std::vector<Maybe> grads(wanted.size());
  const Out dx = make_dx(call, wanted, grads);
  Scratch shared;
  std::optional<Packed<S>> forward;
  if (call.settings.save == Save::recompute) forward.emplace(call, true, shared);
  const Packed<S> backward(call, false, shared);
  const Sums<S> sums(call, wanted, 2 * call.work(), shared);
  const Rows dy_rows(dy);
  sums.for_panels([&](const typename Sums<S>::Set& own, int64_t r, int64_t rows) {
    Chunk<S>(call, needs, forward ? &*forward : nullptr, backward, dy_rows, dx, sums, own).run(r, rows);
  });
  sums.finish(grads);
  return grads;
}

template std::vector<Maybe> backward_narrow<float>(Call&, const Tensor&, const std::vector<bool>&);
template std::vector<Maybe> backward_narrow<double>(Call&, const Tensor&, const std::vector<bool>&);

}  // namespace fastbp::cpu
