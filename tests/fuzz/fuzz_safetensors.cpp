#include "engine/safetensors.h"
#include "tests/fuzz/safetensors_mutator.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return fuzz::parse([&] {
    const SafetensorsReader file("a.safetensors", {data, data + size});
    uint64_t bytes = 0;
    for (const TensorInfo& t : file.tensors()) {
      if (t.offset > size || t.bytes > size - t.offset || file.find(t.name) != &t) std::abort();
      bytes += t.bytes;
      // Types that are not read are refused, one at a time.
      fuzz::parse([&] {
        std::vector<float> values(t.elements);
        file.read_f32(t, values.data());
      });
      fuzz::parse([&] { file.hash(t); });
    }
    if (bytes > size) std::abort();
  });
}
