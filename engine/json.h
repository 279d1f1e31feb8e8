// JSON from files that nobody vouches for: strict parsing over nlohmann::json, and getters that
// check type and range and name file, key, value and what is allowed.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/error.h"

namespace ddpm {

struct JsonLimits {
  size_t bytes = size_t{1} << 20;
  size_t token_bytes = size_t{1} << 20;  // one string, number or gap; bounds the parser's memory
  int depth = 16;
};

// Receives the parts of a JSON text in order. A call may reject the text.
class JsonVisitor {
 public:
  virtual ~JsonVisitor() = default;
  virtual void null() = 0;
  virtual void boolean(bool value) = 0;
  virtual void negative(int64_t value) = 0;  // an integer written with a minus sign
  virtual void integer(uint64_t value) = 0;  // any other
  virtual void real(double value) = 0;       // written with a point or an exponent; finite
  virtual void string(std::string& value) = 0;
  virtual void start_object() = 0;
  virtual void key(std::string& name) = 0;
  virtual void end_object() = 0;
  virtual void start_array() = 0;
  virtual void end_array() = 0;

 protected:
  // Throws, naming the file and the byte, counted from 1, that was read last.
  [[noreturn]] void reject(const std::string& reason) const;

 private:
  friend class JsonReader;
  std::string name_;
  Status status_ = Status::kFile;
  size_t position_ = 0;
};

// Hands `text` to `visitor`, using no memory beyond one token. Rejects, as Error(status) naming
// `name`, the byte and the reason: whatever is not JSON, invalid UTF-8, a text, token or nesting
// over the limits, bytes behind the value, integers of more than 19 digits, numbers too large for
// double, NUL characters. Duplicate keys are the visitor's to reject. `offset` is the text's place
// in its file.
void visit_json(std::string_view text, const std::string& name, Status status, JsonVisitor& visitor,
                const JsonLimits& limits = {}, size_t offset = 0);

// nlohmann's destructor of a value with children allocates, and ends the process where it cannot.
// This takes the value apart from its leaves up, which allocates nothing.
struct JsonDeleter {
  void operator()(nlohmann::json* value) const noexcept;
};
using JsonDocument = std::unique_ptr<nlohmann::json, JsonDeleter>;

// The text as a value, never null; duplicate keys are rejected too.
JsonDocument parse_json(std::string_view text, const std::string& name, Status status,
                        const JsonLimits& limits = {});
// The file's value; a missing or unusable file is Error(status).
JsonDocument read_json_file(const std::string& path, Status status, const JsonLimits& limits = {});

// The text of a file: two-space indent, keys in the order they were added, a newline at the end.
std::string to_text(const nlohmann::ordered_json& value);

// `text` for a message: at most `max_bytes` of it, unprintable bytes as \xNN.
std::string printable(std::string_view text, size_t max_bytes = 80);
std::string in_quotes(std::string_view text, size_t max_bytes = 80);

// An object whose keys are all meant to be read. Every getter marks its key as known; finish()
// rejects the others. A getter without a fallback requires its key. Errors are Error(kConfig).
class JsonObject {
 public:
  // `name` is the file, `scope` the dotted path of this object in it. `value` is not copied, and
  // must stay.
  JsonObject(std::string name, const nlohmann::json& value, std::string scope = "");
  JsonObject(std::string name, nlohmann::json&& value, std::string scope = "") = delete;

  bool has(const std::string& key);      // present, null included
  bool is_null(const std::string& key);  // present and null
  bool is_list(const std::string& key);
  void ignore(const std::string& key);  // allowed, whatever it holds
  std::vector<std::string> keys() const;

  int64_t get_int(const std::string& key, int64_t min, int64_t max,
                  std::optional<int64_t> fallback = {});
  double get_double(const std::string& key, double min, double max,
                    std::optional<double> fallback = {});
  bool get_bool(const std::string& key, std::optional<bool> fallback = {});
  // `allowed` empty: any string.
  std::string get_string(const std::string& key, const std::vector<std::string>& allowed = {},
                         std::optional<std::string> fallback = {});
  std::vector<int64_t> get_int_list(const std::string& key, int64_t min, int64_t max,
                                    std::optional<std::vector<int64_t>> fallback = {});
  std::vector<std::string> get_string_list(const std::string& key,
                                           const std::vector<std::string>& allowed = {},
                                           std::optional<std::vector<std::string>> fallback = {});
  // The object at `key`, to be finished on its own; an empty one where it is absent.
  JsonObject get_object(const std::string& key);

  void finish() const;  // Error(kConfig) for a key that nobody asked for

  // 'FILE: "scope.key" is VALUE; allowed: ...', for checks the getters do not know.
  [[noreturn]] void reject(const std::string& key, const std::string& allowed) const;

 private:
  const nlohmann::json* find(const std::string& key, bool required, const std::string& allowed);
  [[noreturn]] void reject(const std::string& key, const nlohmann::json& value,
                           const std::string& allowed) const;

  std::string name_;
  std::string scope_;
  const nlohmann::json* value_;
  std::vector<std::string> known_;
};

}  // namespace ddpm
