// Records of 3,073 bytes: an input is a number of them, and what is short of or beyond them.
#include "engine/dataset.h"
#include "tests/fuzz/fuzz.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::OneFileFolder folder("test_batch.bin");
  folder.put(data, size);
  return fuzz::parse([&] {
    const Dataset d = load_cifar(folder.path(), Split::kTest);
    if (d.images.size() + d.labels.size() != size) std::abort();
  });
}
