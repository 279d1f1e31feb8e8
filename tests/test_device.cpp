// What is kept of a device's plans between starts.
#include <catch2/catch.hpp>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <optional>

#include "engine/file_io.h"
#include "model/device.h"
#include "tests/recording_backend.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using nlohmann::json;

namespace {

// The cache folder of this process, until it goes.
class CacheFolder {
 public:
  explicit CacheFolder(const std::string& path) {
    if (const char* old = std::getenv("XDG_CACHE_HOME")) old_ = old;
    setenv("XDG_CACHE_HOME", path.c_str(), 1);
  }
  ~CacheFolder() {
    if (old_)
      setenv("XDG_CACHE_HOME", old_->c_str(), 1);
    else
      unsetenv("XDG_CACHE_HOME");
  }
  CacheFolder(const CacheFolder&) = delete;
  CacheFolder& operator=(const CacheFolder&) = delete;

 private:
  std::optional<std::string> old_;
};

class Planner : public test::RecordingBackend {
 public:
  Planner(std::string library, json made) : library_(std::move(library)), made_(std::move(made)) {}
  std::string plans() const override {
    return json{{"library", library_}, {"plans", made_}}.dump();
  }
  void use_plans(const std::string& text) override { given = json::parse(text); }
  json given;

 private:
  std::string library_;
  json made_;
};

const json kNone = json::object();

}  // namespace

TEST_CASE("device.plans: a later start on the same device is given what was kept", "[device]") {
  const test::TempFolder folder;
  const CacheFolder cache(folder.path() + "/not/there/yet");
  keep_plans(Planner("lib 1, chip", {{"a", 1}, {"b", 2}}));
  keep_plans(Planner("lib 1, chip", {{"b", 3}, {"c", 4}}));  // another model's, and one anew
  keep_plans(Planner("lib 2, chip", {{"a", 7}}));

  Planner same("lib 1, chip", kNone), newer("lib 2, chip", kNone), other("lib 1, another", kNone);
  for (Planner* p : {&same, &newer, &other}) recall_plans(*p);
  CHECK(same.given["plans"] == json{{"a", 1}, {"b", 3}, {"c", 4}});
  CHECK(newer.given["plans"] == json{{"a", 7}});
  CHECK(other.given.is_null());
}

TEST_CASE("device.plans: without a usable cache nothing is kept and nothing fails", "[device]") {
  const test::TempFolder folder;
  {
    const CacheFolder cache("/proc/nowhere");
    keep_plans(Planner("lib", {{"a", 1}}));
    Planner p("lib", kNone);
    recall_plans(p);
    CHECK(p.given.is_null());
  }
  const CacheFolder cache(folder.path());
  make_folders(folder.path() + "/ddpm");
  for (const char* damaged : {"", "{\"lib\":", "[]", "{\"lib\": 3}"}) {
    INFO(damaged);
    write_file(folder.path() + "/ddpm/plans.json", damaged);
    keep_plans(Planner("lib", {{"a", 1}}));
    Planner p("lib", kNone);
    recall_plans(p);
    CHECK(p.given["plans"] == json{{"a", 1}});
  }
}

TEST_CASE("device.plans: a backend that chooses nothing by measuring writes no file", "[device]") {
  const test::TempFolder folder;
  const CacheFolder cache(folder.path());
  test::RecordingBackend plain;
  keep_plans(plain);
  recall_plans(plain);
  CHECK_FALSE(folder_exists(folder.path() + "/ddpm"));
}
