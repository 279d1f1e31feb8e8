// Three files of a model or run: the first byte says which.
#include <nlohmann/json.hpp>

#include "engine/json.h"
#include "model/run_config.h"
#include "tests/fuzz/fuzz.h"

using namespace ddpm;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string_view text = fuzz::text_of(data + 1, size - 1);
  return fuzz::parse([&] {
    // What is accepted is accepted again as it would be written.
    if (data[0] % 3 == 0)
      parse_unet_config(to_json(parse_unet_config(text, "a")).dump(), "b");
    else if (data[0] % 3 == 1)
      parse_scheduler_config(to_json(parse_scheduler_config(text, "a")).dump(), "b");
    else
      run_config_from_json(
          to_json(run_config_from_json(*parse_json(text, "a", Status::kConfig), "a")), "b");
  });
}
