// Event files beside one by TensorBoard's own writer (golden/make_events.py), and those of a run.
#include <catch2/catch.hpp>

#include <filesystem>

#include "tests/child.h"
#include "tests/temp_folder.h"
#include "tools/event_file.h"

using namespace ddpm;
using namespace ddpm::test;

TEST_CASE("event_file: the checksum's known answers", "[event_file]") {
  CHECK(tools::crc32c("123456789") == 0xe3069283u);
  CHECK(tools::crc32c(std::string(32, '\0')) == 0x8a9136aau);  // RFC 3720, B.4
  CHECK(tools::crc32c(std::string(32, '\xff')) == 0x62a8ab43u);
  CHECK(tools::crc32c("") == 0);
}

TEST_CASE("event_file: bytes as TensorBoard writes them", "[event_file]") {
  const TempFolder tmp;
  {
    tools::EventFile file(tmp / "events", 1.5e9, 300);
    file.add(1.5e9 + 0.25, 350, {{"loss", 0.125}, {"learning_rate", 2e-4}});
    file.add(1.5e9 + 1, 70000, {{"loss", 0.0}});
  }
  CHECK(get_bytes(tmp / "events") == get_bytes(DDPM_SOURCE_DIR "/tests/golden/events.tfevents"));
}

namespace {

std::vector<std::string> event_files(const std::string& run) {
  std::vector<std::string> found;
  for (const auto& entry : std::filesystem::directory_iterator(run + "/tensorboard"))
    found.push_back(entry.path());
  std::sort(found.begin(), found.end());
  return found;
}

}  // namespace

TEST_CASE("event_file: a run has one for each start, with what it logs", "[event_file]") {
  const TempFolder tmp;
  const std::string run = tmp / "run", more = "--batch-size 2 --save-every 2 --steps ";
  REQUIRE(Child(train_command(run, more + "3"), tmp / "log").wait() == 0);
  const auto first = event_files(run);
  REQUIRE(first.size() == 1);
  CHECK(std::filesystem::path(first[0]).filename().string().starts_with("events.out.tfevents."));
  const std::string bytes = get_bytes(first[0]);
  for (const char* tag : {"loss", "grad_norm", "learning_rate", "images_per_second"})
    CHECK(bytes.find(std::string("\x0a") + static_cast<char>(std::string(tag).size()) + tag) !=
          std::string::npos);
  // The third step is made again by the second start, which says so.
  std::filesystem::remove_all(checkpoint_folder(run, 3));
  REQUIRE(Child(train_command(run, more + "4"), tmp / "log").wait() == 0);
  auto second = event_files(run);
  REQUIRE(second.size() == 2);
  std::erase(second, first[0]);
  const std::string start("\x10\x03\x3a\x02\x08\x01", 6);  // step 3, session log, status START
  CHECK(get_bytes(second[0]).find(start) != std::string::npos);
  CHECK(bytes.find(start) == std::string::npos);
}
