#include "engine/dataset.h"
#include "tests/fuzz/safetensors_mutator.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::MemoryFile file(data, size);
  return fuzz::parse([&] {
    const Dataset d = load_packed(file.path());
    if (d.images.size() != static_cast<size_t>(d.count) * d.image_bytes()) std::abort();
  });
}
