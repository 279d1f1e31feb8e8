#include "tests/fuzz/fuzz.h"
#include "tools/eval_progress.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const fuzz::MemoryFile file(data, size);
  return fuzz::parse([&] {
    const tools::EvalProgress p = tools::read_eval_progress(file.path(), {{"model", "a"}}, 3);
    if (p.sums.images < 0 || p.sums.terms.size() != 3) std::abort();
  });
}
