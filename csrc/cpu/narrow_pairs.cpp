#include "narrow.h"
#include "pairs.h"
#include "results.h"

namespace fastbp::cpu {

std::vector<Tensor> forward_narrow_pairs(Call& call) {
  const int64_t hidden = call.hidden(), layers = call.layers();
  const bool keeps_z = call.settings.keeps_z();
  Results results(call);
  Scratch shared;
  const PairedWeights weights(call, true, shared);

  for_each((call.rows + kPanel - 1) / kPanel, threads_for(call.work()), [&](int64_t item) {
    const int64_t r = item * kPanel, rows = std::min(kPanel, call.rows - r);
    Scratch scratch;
    Space space(call, scratch);
    Word *h_room = space.words(), *z_room[2] = {space.words(), space.words()};
    Words h = words_of(call.x, r, rows, h_room, space.room);
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t first = call.first(layer), n = call.weights[first].out;
      const Out out = layer == layers - 1 ? results.y : results[first].h;
      if (layer == hidden) {
        weights.multiply(first, rows, h, word_at(out, r), n);
        break;
      }
      Words z[2];
      for (int part = 0; part < call.width(); ++part) {
        Word* to = keeps_z ? word_at(results[first + part].z, r) : z_room[part];
        z[part] = {to, keeps_z || n % 2 == 0 ? n : space.room};
        weights.multiply(first + part, rows, h, to, z[part].stride);
        results.encode(call.compressed(), first + part, r, rows, 0, n, to, z[part].stride);
      }
      // An output of odd length is no operand of a product where it lies.
      const bool copies = out && n % 2 && layer < layers - 1;
      Word* to = out && !copies ? word_at(out, r) : h_room;
      h = {to, out && !copies ? n : n % 2 ? space.room : n};
      output(call, rows, n, z, to, h.stride, results[first].bits.over(r, 0));
      for (int64_t i = 0; i < rows && copies; ++i) std::copy_n(to + i * h.stride, n, word_at(out, r + i));
    }
  });
  return std::move(results.tensors);
}

}  // namespace fastbp::cpu
