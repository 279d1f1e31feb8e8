#include <map>
#include <vector>

#include "engine/safetensors.h"
#include "tests/fuzz/safetensors_mutator.h"
#include "tests/fuzz/suspended_model.h"
#include "tools/suspended.h"

using namespace ddpm;

namespace {

// Gives a file the checksum of what it has become: with another one nothing else of it is read.
void set_checksum(std::vector<uint8_t>& bytes) {
  constexpr std::string_view kKey = "\"checksum\":\"";
  const SafetensorsReader file("x", bytes);
  std::map<std::string, std::string> hashes;
  for (const TensorInfo& t : file.tensors()) hashes[t.name] = file.hash(t);
  std::string text;
  for (const auto& part : {file.metadata(), hashes})
    for (const auto& [key, value] : part)
      if (key != "checksum") text += key + "=" + value + "\n";
  const std::string sum = hash_of(text);
  const size_t at = fuzz::text_of(bytes.data(), bytes.size()).find(kKey);
  if (at == std::string_view::npos || bytes.size() - at < kKey.size() + sum.size()) return;
  std::copy(sum.begin(), sum.end(), bytes.begin() + static_cast<ptrdiff_t>(at + kKey.size()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const fuzz::SuspendedModel model;
  std::vector<uint8_t> bytes(data, data + size);
  fuzz::parse([&] { set_checksum(bytes); });
  const fuzz::MemoryFile file(bytes.data(), bytes.size());
  return fuzz::parse([&] {
    const tools::Sampling s = tools::read_sampling(file.path(), model.pipeline());
    const auto values = [](int64_t images) { return static_cast<size_t>(4 * images); };
    const int64_t now = s.steps_done > 0 ? s.batch() : 0;
    if (s.images_done >= s.num || s.steps_done >= static_cast<int>(s.rows.size()) ||
        s.labels.size() != static_cast<size_t>(s.num) || s.images.size() != values(s.images_done) ||
        s.x.size() != values(now) || s.starts.size() > values(s.num))
      std::abort();
  });
}
