#include "narrow.h"

#include "panels.h"
#include "parallel.h"
#include "results.h"

namespace fastbp::cpu {

template <class S>
std::vector<Tensor> forward_narrow(Call& call) {
  const Settings& settings = call.settings;
  const int64_t hidden = call.hidden(), layers = call.layers();
  Results results(call);
  Scratch shared;
  const Packed<S> packed(call, true, shared);
  const int64_t room = round_up(widest(call), kernels<S>().tile_columns) + 16;

  for_each((call.rows + kPanel - 1) / kPanel, threads_for(call.work()), [&](int64_t item) {
    const int64_t r = item * kPanel, rows = std::min(kPanel, call.rows - r);
    Scratch scratch;
    S* buffer = scratch.take<S>(kPanel * room);
    S* z_room[2] = {scratch.take<S>(kPanel * room), settings.gated ? scratch.take<S>(kPanel * room) : nullptr};
    // Where numbers of the compute type may be written at once, they are.
    const auto place = [&](const Out& out, S* otherwise) -> std::pair<S*, int64_t> {
      S* const direct = out.template direct<S>(r, 0);
      return direct ? std::pair{direct, out.size} : std::pair{otherwise, room};
    };
    Panel<S> h = panel_of(call.x, r, rows, buffer, room);
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t first = call.first(layer), n = call.weights[first].out;
      const Out out = layer == layers - 1 ? results.y : results[first].h;
      if (layer == hidden) {
        const auto [to, stride] = place(out, z_room[0]);
        packed.multiply(first, rows, h, to, stride);
        if (to == z_room[0]) out.write(r, rows, 0, n, to, stride);
        break;
      }
      S* z[2] = {nullptr, nullptr};
      int64_t z_stride = room;
      for (int part = 0; part < call.width(); ++part) {
        const Out keep = results[first + part].z;
        const auto [to, stride] = place(keep, z_room[part]);
        packed.multiply(first + part, rows, h, to, stride);
        if (keep && to == z_room[part]) keep.write(r, rows, 0, n, to, stride);
        for (int64_t i = 0; i < rows; ++i) call.round(n, to + i * stride);
        results.encode(call.rounded<S>(), first + part, r, rows, 0, n, to, stride);
        z[part] = to;
        z_stride = stride;
      }
      const auto [to, stride] = place(out, buffer);
      call.output(rows, n, z, z_stride, to, stride, results[first].bits.over(r, 0), bits_size(n));
      if (out && to == buffer) out.write(r, rows, 0, n, to, stride);
      h = {to, stride};
    }
  });
  return std::move(results.tensors);
}

template std::vector<Tensor> forward_narrow<float>(Call&);
template std::vector<Tensor> forward_narrow<double>(Call&);

}  // namespace fastbp::cpu
