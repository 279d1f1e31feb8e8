#include "engine/json.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "engine/file_io.h"
#include "engine/nearest_name.h"

namespace ddpm {

using nlohmann::json;

namespace {

// A container whose children have none is cleared, and destroyed, without an allocation. As deep as
// JsonLimits::depth lets a text be.
void take_apart(json& value) noexcept {
  if (!value.is_structured()) return;
  for (json& child : value) take_apart(child);
  value.clear();
}

}  // namespace

std::string printable(std::string_view text, size_t max_bytes) {
  std::string out;
  for (const char c : text.substr(0, max_bytes))
    out += c >= 0x20 && c < 0x7f ? std::string(1, c) : format("\\x%02x", static_cast<uint8_t>(c));
  return out + (text.size() > max_bytes ? "..." : "");
}

std::string in_quotes(std::string_view text, size_t max_bytes) {
  return '"' + printable(text, max_bytes) + '"';
}

void JsonVisitor::reject(const std::string& reason) const {
  fail(status_, "'%s' is not usable: byte %zu: %s; %s", name_.c_str(), position_, reason.c_str(),
       status_ == Status::kFile ? "it is damaged or of another kind: copy or download it again"
                                : "correct the file there");
}

// Between nlohmann's parser and a visitor: keeps the position and enforces the limits.
class JsonReader {
 public:
  JsonReader(JsonVisitor& visitor, const std::string& name, Status status, const JsonLimits& limits,
             size_t offset)
      : visitor_(visitor), limits_(limits), offset_(offset), token_start_(offset) {
    visitor_.name_ = name;
    visitor_.status_ = status;
    visitor_.position_ = offset;
  }

  void read(std::string_view text);

  // What nlohmann calls.
  bool null() {
    return event([&] { visitor_.null(); });
  }
  bool boolean(bool value) {
    return event([&] { visitor_.boolean(value); });
  }
  bool number_integer(int64_t value) {
    return event([&] { visitor_.negative(value); });
  }
  bool number_unsigned(uint64_t value) {
    if (value > kLargestInteger) visitor_.reject("an integer of more than 19 digits");
    return event([&] { visitor_.integer(value); });
  }
  bool number_float(double value, const std::string& written) {
    // An integer that fits no 64 bits arrives here, rounded.
    if (written.find_first_of(".eE") == std::string::npos)
      visitor_.reject("an integer of more than 19 digits");
    return event([&] { visitor_.real(value); });
  }
  bool string(std::string& value) {
    check_text(value);
    return event([&] { visitor_.string(value); });
  }
  bool binary(json::binary_t&) { return false; }
  bool start_object(size_t) {
    enter();
    return event([&] { visitor_.start_object(); });
  }
  bool key(std::string& name) {
    check_text(name);
    return event([&] { visitor_.key(name); });
  }
  bool end_object() {
    --depth_;
    return event([&] { visitor_.end_object(); });
  }
  bool start_array(size_t) {
    enter();
    return event([&] { visitor_.start_array(); });
  }
  bool end_array() {
    --depth_;
    return event([&] { visitor_.end_array(); });
  }
  bool parse_error(size_t position, const std::string& last, const json::exception& error);

 private:
  static constexpr uint64_t kLargestInteger = 9'999'999'999'999'999'999u;

  // Walks the text for nlohmann, which asks for every byte once.
  struct Cursor {
    using iterator_category = std::forward_iterator_tag;
    using value_type = char;
    using difference_type = std::ptrdiff_t;
    using pointer = const char*;
    using reference = const char&;

    const char* at;
    JsonReader* reader;

    reference operator*() const { return *at; }
    Cursor& operator++() {
      ++at;
      reader->step();
      return *this;
    }
    Cursor operator++(int) {
      Cursor before = *this;
      ++*this;
      return before;
    }
    bool operator==(const Cursor& other) const { return at == other.at; }
    bool operator!=(const Cursor& other) const { return at != other.at; }
  };

  void step() {
    if (++visitor_.position_ - token_start_ > limits_.token_bytes)
      visitor_.reject(
          format("a string, number or gap of more than %zu bytes", limits_.token_bytes));
  }
  template <typename F>
  bool event(F call) {
    token_start_ = visitor_.position_;
    call();
    return true;
  }
  void enter() {
    if (++depth_ > limits_.depth)
      visitor_.reject(format("nested deeper than %d levels", limits_.depth));
  }
  void check_text(const std::string& text) {
    if (text.find('\0') != std::string::npos) visitor_.reject("a NUL character in a string");
  }

  JsonVisitor& visitor_;
  const JsonLimits& limits_;
  const size_t offset_;
  size_t token_start_;  // the end of the last event
  int depth_ = 0;
};

void JsonReader::read(std::string_view text) {
  if (text.size() > limits_.bytes)
    visitor_.reject(
        format("%zu bytes of text, but at most %zu are allowed", text.size(), limits_.bytes));
  // nlohmann skips a byte order mark, and takes a NUL byte for the end of the text.
  if (text.starts_with("\xEF\xBB\xBF"))
    visitor_.reject("a byte order mark; save the file as UTF-8 without one");
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) {
    visitor_.position_ = offset_ + nul + 1;
    visitor_.reject("a NUL byte");
  }
  json::sax_parse(Cursor{text.data(), this}, Cursor{text.data() + text.size(), this}, this);
}

bool JsonReader::parse_error(size_t position, const std::string&, const json::exception& error) {
  visitor_.position_ = offset_ + position;
  // "[json.exception.parse_error.101] parse error at line 1, column 5: REASON; last read: ..."
  std::string reason = error.what();
  if (const size_t end = reason.find("] "); end != std::string::npos) reason.erase(0, end + 2);
  if (reason.starts_with("parse error at"))
    if (const size_t end = reason.find(": "); end != std::string::npos) reason.erase(0, end + 2);
  visitor_.reject(printable(reason, 160));
}

void JsonDeleter::operator()(json* value) const noexcept {
  take_apart(*value);
  delete value;
}

void visit_json(std::string_view text, const std::string& name, Status status, JsonVisitor& visitor,
                const JsonLimits& limits, size_t offset) {
  JsonReader(visitor, name, status, limits, offset).read(text);
}

namespace {

// Builds a document, rejecting duplicate keys. Only values without children are ever nlohmann's to
// destroy.
class ValueBuilder : public JsonVisitor {
 public:
  JsonDocument take() { return std::move(root_); }

  void null() override { add(nullptr); }
  void boolean(bool value) override { add(value); }
  void negative(int64_t value) override { add(value); }
  void integer(uint64_t value) override { add(value); }
  void real(double value) override { add(value); }
  void string(std::string& value) override { add(std::move(value)); }
  void start_object() override { open_.push_back(add(json::object())); }
  void key(std::string& name) override {
    if (open_.back()->contains(name)) reject("the key " + in_quotes(name) + " stands twice");
    key_ = std::move(name);
  }
  void end_object() override { open_.pop_back(); }
  void start_array() override { open_.push_back(add(json::array())); }
  void end_array() override { open_.pop_back(); }

 private:
  // A pointer to the value stays valid while it is open: nothing is added beside it until it
  // closes.
  json* add(json value) {
    if (open_.empty()) return &(*root_ = std::move(value));
    json& parent = *open_.back();
    if (parent.is_object()) return &(parent[key_] = std::move(value));
    parent.push_back(std::move(value));
    return &parent.back();
  }

  JsonDocument root_{new json};
  std::vector<json*> open_;
  std::string key_;
};

std::string shown(const json& value) {
  const std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() <= 80 ? text : text.substr(0, 80) + "...";
}

// Whether `value` is written as an integer of [min, max]. The json type keeps large unsigned values
// apart, and converts silently.
std::optional<int64_t> integer_in(const json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return {};
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
    return {};
  const int64_t number = value.get<int64_t>();
  if (number < min || number > max) return {};
  return number;
}

std::string integer_range(int64_t min, int64_t max) {
  const auto low = static_cast<long long>(min), high = static_cast<long long>(max);
  if (min == max) return format("%lld", low);
  if (max == std::numeric_limits<int64_t>::max()) return format("an integer from %lld", low);
  return format("an integer from %lld to %lld", low, high);
}

std::string one_of(const std::vector<std::string>& allowed) {
  if (allowed.empty()) return "a string";
  std::string text = "one of";
  for (const std::string& name : allowed) text += (text == "one of" ? " \"" : ", \"") + name + "\"";
  return text;
}

bool is_allowed(const json& value, const std::vector<std::string>& allowed) {
  if (!value.is_string()) return false;
  return allowed.empty() || std::find(allowed.begin(), allowed.end(),
                                      value.get_ref<const std::string&>()) != allowed.end();
}

std::string element(const std::string& key, size_t i) {
  return key + "[" + std::to_string(i) + "]";
}

}  // namespace

JsonDocument parse_json(std::string_view text, const std::string& name, Status status,
                        const JsonLimits& limits) {
  ValueBuilder builder;
  visit_json(text, name, status, builder, limits);
  return builder.take();
}

JsonDocument read_json_file(const std::string& path, Status status, const JsonLimits& limits) {
  return parse_json(read_small_file(path, limits.bytes, status), path, status, limits);
}

std::string to_text(const nlohmann::ordered_json& value) { return value.dump(2) + "\n"; }

JsonObject::JsonObject(std::string name, const json& value, std::string scope)
    : name_(std::move(name)), scope_(std::move(scope)), value_(&value) {
  if (!value_->is_object())
    fail(Status::kConfig, "%s: %s is %s; it must be an object: {...}", name_.c_str(),
         scope_.empty() ? "the content" : in_quotes(scope_).c_str(), shown(*value_).c_str());
}

const json* JsonObject::find(const std::string& key, bool required, const std::string& allowed) {
  ignore(key);
  const auto it = value_->find(key);
  if (it != value_->end()) return &*it;
  if (required)
    fail(Status::kConfig, "%s: %s is missing; allowed: %s", name_.c_str(),
         in_quotes(scope_.empty() ? key : scope_ + "." + key).c_str(), allowed.c_str());
  return nullptr;
}

void JsonObject::reject(const std::string& key, const json& value,
                        const std::string& allowed) const {
  fail(Status::kConfig, "%s: %s is %s; allowed: %s", name_.c_str(),
       in_quotes(scope_.empty() ? key : scope_ + "." + key).c_str(), shown(value).c_str(),
       allowed.c_str());
}

void JsonObject::reject(const std::string& key, const std::string& allowed) const {
  const json missing;
  const auto it = value_->find(key);
  reject(key, it == value_->end() ? missing : *it, allowed);
}

std::vector<std::string> JsonObject::keys() const {
  std::vector<std::string> names;
  for (const auto& [name, value] : value_->items()) names.push_back(name);
  return names;
}

void JsonObject::ignore(const std::string& key) {
  if (std::find(known_.begin(), known_.end(), key) == known_.end()) known_.push_back(key);
}

bool JsonObject::has(const std::string& key) { return find(key, false, "") != nullptr; }

bool JsonObject::is_null(const std::string& key) {
  const json* value = find(key, false, "");
  return value != nullptr && value->is_null();
}

bool JsonObject::is_list(const std::string& key) {
  const json* value = find(key, false, "");
  return value != nullptr && value->is_array();
}

int64_t JsonObject::get_int(const std::string& key, int64_t min, int64_t max,
                            std::optional<int64_t> fallback) {
  const std::string allowed = integer_range(min, max);
  const json* value = find(key, !fallback, allowed);
  if (value == nullptr) return *fallback;
  const std::optional<int64_t> number = integer_in(*value, min, max);
  if (!number) reject(key, *value, allowed);
  return *number;
}

double JsonObject::get_double(const std::string& key, double min, double max,
                              std::optional<double> fallback) {
  const std::string allowed = format("a number from %.9g to %.9g", min, max);
  const json* value = find(key, !fallback, allowed);
  if (value == nullptr) return *fallback;
  if (!value->is_number()) reject(key, *value, allowed);
  const double number = value->get<double>();
  if (!(number >= min && number <= max)) reject(key, *value, allowed);
  return number;
}

bool JsonObject::get_bool(const std::string& key, std::optional<bool> fallback) {
  const json* value = find(key, !fallback, "true or false");
  if (value == nullptr) return *fallback;
  if (!value->is_boolean()) reject(key, *value, "true or false");
  return value->get<bool>();
}

std::string JsonObject::get_string(const std::string& key, const std::vector<std::string>& allowed,
                                   std::optional<std::string> fallback) {
  const json* value = find(key, !fallback, one_of(allowed));
  if (value == nullptr) return *fallback;
  if (!is_allowed(*value, allowed)) reject(key, *value, one_of(allowed));
  return value->get<std::string>();
}

std::vector<int64_t> JsonObject::get_int_list(const std::string& key, int64_t min, int64_t max,
                                              std::optional<std::vector<int64_t>> fallback) {
  const std::string allowed = "a list, each " + integer_range(min, max);
  const json* value = find(key, !fallback, allowed);
  if (value == nullptr) return *fallback;
  if (!value->is_array()) reject(key, *value, allowed);
  std::vector<int64_t> list;
  for (const json& item : *value) {
    const std::optional<int64_t> number = integer_in(item, min, max);
    if (!number) reject(element(key, list.size()), item, integer_range(min, max));
    list.push_back(*number);
  }
  return list;
}

std::vector<std::string> JsonObject::get_string_list(
    const std::string& key, const std::vector<std::string>& allowed,
    std::optional<std::vector<std::string>> fallback) {
  const std::string kind = "a list, each " + one_of(allowed);
  const json* value = find(key, !fallback, kind);
  if (value == nullptr) return *fallback;
  if (!value->is_array()) reject(key, *value, kind);
  std::vector<std::string> list;
  for (const json& item : *value) {
    if (!is_allowed(item, allowed)) reject(element(key, list.size()), item, one_of(allowed));
    list.push_back(item.get<std::string>());
  }
  return list;
}

JsonObject JsonObject::get_object(const std::string& key) {
  static const json empty = json::object();
  const json* value = find(key, false, "");
  return JsonObject(name_, value == nullptr ? empty : *value,
                    scope_.empty() ? key : scope_ + "." + key);
}

void JsonObject::finish() const {
  for (const auto& [key, value] : value_->items()) {
    if (std::find(known_.begin(), known_.end(), key) != known_.end()) continue;
    std::string hint = did_you_mean(key, known_);
    if (hint.empty()) hint = "; remove it";
    fail(Status::kConfig, "%s: unknown key %s%s", name_.c_str(),
         in_quotes(scope_.empty() ? key : scope_ + "." + key).c_str(), hint.c_str());
  }
}

}  // namespace ddpm
