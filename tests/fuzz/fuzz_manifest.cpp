#include "model/pipeline.h"
#include "tests/fuzz/fuzz.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static fuzz::OneFileFolder folder("manifest.json");
  folder.put(data, size);
  return fuzz::parse([] { read_manifest(folder.path()); });
}
