#include "engine/json.h"

#include <catch2/catch.hpp>
#include <functional>
#include <nlohmann/json.hpp>

#include "engine/nearest_name.h"
#include "tests/temp_folder.h"

using namespace ddpm;
using namespace ddpm::test;
using Catch::Matchers::Contains;
using Catch::Matchers::Equals;
using nlohmann::json;

namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int64_t>::max();
constexpr int64_t kMinInt = std::numeric_limits<int64_t>::min();

std::string error_of(Status status, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& e) {
    CHECK(e.status() == status);
    return e.what();
  }
  return "no error was thrown";
}

std::string parse_error(const std::string& text, const JsonLimits& limits = {}) {
  return error_of(Status::kFile, [&] { parse_json(text, "f.json", Status::kFile, limits); });
}

json parse(const std::string& text) { return *parse_json(text, "f.json", Status::kConfig); }

std::string config_error(const std::function<void()>& call) {
  return error_of(Status::kConfig, call);
}

}  // namespace

TEST_CASE("json: what is sound parses to its value", "[json]") {
  CHECK(parse("{}") == json::object());
  CHECK(parse(" [1, -2, 0.5, 1e3, \"a\", null, true, false, [], {}] \n") ==
        json::parse(R"([1, -2, 0.5, 1000.0, "a", null, true, false, [], {}])"));
  CHECK(parse(R"({"a":{"b":[{"c":1},{"c":2}]},"d":{"b":3}})") ==
        json::parse(R"({"a":{"b":[{"c":1},{"c":2}]},"d":{"b":3}})"));
  CHECK(parse("9223372036854775807").get<int64_t>() == kMaxInt);
  CHECK(parse("-9223372036854775808").get<int64_t>() == kMinInt);
  CHECK(parse("9999999999999999999").get<uint64_t>() == 9999999999999999999u);
  CHECK(parse("\"\xC3\xA9 \\u00e9 \\ud83d\\ude00\"").get<std::string>() ==
        "\xC3\xA9 \xC3\xA9 \xF0\x9F\x98\x80");
  CHECK(parse(std::string(16, '[') + std::string(16, ']')).is_array());
  CHECK(parse("[" + std::string(100, ' ') + "1]") == json{1});
}

TEST_CASE("json: what is not sound is rejected with its place", "[json]") {
  struct Bad {
    std::string text, part;
  };
  const Bad bad[] = {
      {"", "unexpected end of input"},
      {"   ", "unexpected end of input"},
      {"{\"a\":1", "unexpected end of input"},
      {"{\"a\":1}}", "byte 8"},
      {"{\"a\":1} x", "invalid literal"},
      {"1 2", "byte 3"},
      {"{}\n{}", "byte 4"},
      {"{a:1}", "invalid literal"},
      {"{'a':1}", "invalid literal"},
      {"[1,]", "unexpected ']'"},
      {"{\"a\":1,}", "byte 8"},
      {"// no\n{}", "byte 1"},
      {"{\"a\":1,\"b\":2,\"a\":3}", "byte 16: the key \"a\" stands twice"},
      {"{\"x\":{\"a\":1,\"\\u0061\":3}}", "\"a\" stands twice"},
      {"[NaN]", "invalid literal"},
      {"[Infinity]", "invalid literal"},
      {"[-Infinity]", "byte 3"},
      {"[nan]", "invalid literal"},
      {"[1e999]", "number overflow"},
      {"[-1e999]", "number overflow"},
      {"[10000000000000000000]", "more than 19 digits"},
      {"[18446744073709551615]", "more than 19 digits"},
      {"[18446744073709551616]", "more than 19 digits"},
      {"[-9223372036854775809]", "more than 19 digits"},
      {"[-99999999999999999999999]", "more than 19 digits"},
      {"[01]", "byte 3"},
      {"[+1]", "byte 2"},
      {"[.5]", "byte 2"},
      {"[1.]", "byte 4"},
      {"[0x10]", "byte 3"},
      {"\"\x80\"", "ill-formed UTF-8"},
      {"\"\xC0\xAF\"", "ill-formed UTF-8"},      // overlong
      {"\"\xED\xA0\x80\"", "ill-formed UTF-8"},  // surrogate
      {"\"\xF4\x90\x80\x80\"", "ill-formed UTF-8"},
      {"\"\xE2\x82\"", "ill-formed UTF-8"},
      {"\"\\ud800\"", "surrogate"},
      {"\"\\q\"", "backslash"},
      {"\"a\nb\"", "control character"},
      {"\"\\u0000\"", "a NUL character"},
      {"{\"a\\u0000\":1}", "a NUL character"},
      {std::string("{}\0", 3), "byte 3: a NUL byte"},
      {std::string("{}\0garbage", 10), "a NUL byte"},
      {std::string("\0{}", 3), "byte 1: a NUL byte"},
      {"\xEF\xBB\xBF{}", "byte order mark"},
      {std::string(17, '[') + std::string(17, ']'), "byte 17: nested deeper than 16"},
      {std::string(100000, '['), "nested deeper"},
      {"\xFF\xFE{\0}\0", "invalid literal"},
  };
  for (const Bad& b : bad) {
    INFO(b.text.substr(0, 100));
    const std::string message = parse_error(b.text);
    CHECK_THAT(message, Contains("'f.json' is not usable: byte ") && Contains(b.part));
    CHECK_THAT(message, Contains("copy or download it again"));
    CHECK(
        message.find_first_not_of(" !\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]"
                                  "^_`abcdefghijklmnopqrstuvwxyz{|}~") == std::string::npos);
    CHECK(message.size() < 400);
    CHECK_THROWS_AS(parse(b.text), Error);
  }
  CHECK_THAT(config_error([] { parse("[1,"); }), Contains("correct the file there"));
}

TEST_CASE("json: limits hold", "[json]") {
  CHECK_THAT(parse_error("[1,2,3]", {.bytes = 6}),
             Contains("7 bytes of text") && Contains("at most 6"));
  CHECK(parse_json("[1,2,3]", "f", Status::kFile, {.bytes = 7})->size() == 3);
  const std::string text = "[\"" + std::string(50, 'x') + "\"]";
  CHECK_THAT(parse_error(text, {.token_bytes = 40}), Contains("more than 40 bytes"));
  CHECK(parse_json(text, "f", Status::kFile, {.token_bytes = 60})->size() == 1);
  CHECK_THAT(parse_error("[[1]]", {.depth = 1}), Contains("byte 2: nested deeper than 1"));
  CHECK(parse_json("[[1],[2]]", "f", Status::kFile, {.depth = 2})->size() == 2);
  // Every truncation of a sound text is rejected; the text itself is not.
  const std::string sound = R"({"a":[1,2.5,"x\n"],"b":{"c":null,"d":true}})";
  for (size_t n = 0; n < sound.size(); ++n) CHECK_THROWS_AS(parse(sound.substr(0, n)), Error);
  CHECK_NOTHROW(parse(sound));
}

TEST_CASE("json: files", "[json]") {
  TempFolder folder;
  const auto ordered = nlohmann::ordered_json::parse(R"({"b":1,"a":[1,2]})");
  CHECK_THAT(to_text(ordered), Equals("{\n  \"b\": 1,\n  \"a\": [\n    1,\n    2\n  ]\n}\n"));
  put_bytes(folder / "c.json", to_text(ordered));
  CHECK(*read_json_file(folder / "c.json", Status::kConfig) == json::parse(R"({"a":[1,2],"b":1})"));
  CHECK_THAT(config_error([&] { read_json_file(folder / "no.json", Status::kConfig); }),
             Contains("no.json': No such file"));
  const json list = json::array();
  CHECK_THAT(config_error([&] { JsonObject("list.json", list); }),
             Contains("list.json: the content is []; it must be an object"));
}

TEST_CASE("json: integers are integers", "[json]") {
  const json value = parse(
      R"({"i":7,"n":-7,"zero":0,"f":2.9,"one":1.0,"exp":1e0,"s":"7","b":true,"null":null,"l":[7],
          "max":9223372036854775807,"min":-9223372036854775808,"over":9223372036854775808,
          "big":9999999999999999999})");
  JsonObject o("c.json", value);
  CHECK(o.get_int("i", 7, 7) == 7);
  CHECK(o.get_int("n", -7, 0) == -7);
  CHECK(o.get_int("zero", 0, 0) == 0);
  CHECK(o.get_int("max", kMinInt, kMaxInt) == kMaxInt);
  CHECK(o.get_int("min", kMinInt, kMaxInt) == kMinInt);
  CHECK(o.get_int("absent", 1, 5, 3) == 3);
  for (const std::string key : {"f", "one", "exp", "s", "b", "null", "l", "over", "big"}) {
    INFO(key);
    CHECK_THAT(config_error([&] { o.get_int(key, kMinInt, kMaxInt); }),
               Contains("c.json: \"" + key + "\" is ") && Contains("an integer from"));
    CHECK_THROWS_AS(o.get_int(key, kMinInt, kMaxInt, 1), Error);  // a fallback excuses no value
  }
  CHECK_THAT(config_error([&] { o.get_int("f", 0, 10); }),
             Equals("c.json: \"f\" is 2.9; allowed: an integer from 0 to 10"));
  CHECK_THAT(config_error([&] { o.get_int("i", 8, 10); }), Contains("\"i\" is 7; allowed"));
  CHECK_THAT(config_error([&] { o.get_int("i", 0, 6); }), Contains("from 0 to 6"));
  CHECK_THAT(config_error([&] { o.get_int("absent", 1, kMaxInt); }),
             Equals("c.json: \"absent\" is missing; allowed: an integer from 1"));
}

TEST_CASE("json: other getters check type and range", "[json]") {
  const json value = parse(
      R"({"d":0.25,"i":3,"n":-2,"s":"silu","b":false,"null":null,"il":[1,2,3],"sl":["a","b"],
          "empty":[],
          "bad_il":[1,2.5],"bad_sl":["a",1],"o":{"x":1,"y":2},"long":")" +
      std::string(500, 'z') + "\"}");
  JsonObject o("c.json", value);
  CHECK(o.get_double("d", 0, 1) == 0.25);
  CHECK(o.get_double("i", 0, 3) == 3.0);
  CHECK(o.get_double("n", -2, 3) == -2.0);
  CHECK(o.get_double("absent", 0, 1, 0.5) == 0.5);
  CHECK_THAT(config_error([&] { o.get_double("d", 0, 0.2); }),
             Equals("c.json: \"d\" is 0.25; allowed: a number from 0 to 0.2"));
  for (const std::string key : {"s", "b", "null", "il", "o"})
    CHECK_THROWS_AS(o.get_double(key, -1e9, 1e9), Error);

  CHECK(o.get_bool("b") == false);
  CHECK(o.get_bool("absent", true) == true);
  CHECK_THAT(config_error([&] { o.get_bool("i"); }), Contains("allowed: true or false"));
  CHECK_THROWS_AS(o.get_bool("null", true), Error);

  CHECK(o.get_string("s") == "silu");
  CHECK(o.get_string("s", {"relu", "silu"}) == "silu");
  CHECK(o.get_string("absent", {"relu"}, "relu") == "relu");
  CHECK_THAT(config_error([&] {
               o.get_string("s", {"relu", "gelu"});
             }),
             Equals("c.json: \"s\" is \"silu\"; allowed: one of \"relu\", \"gelu\""));
  CHECK_THAT(config_error([&] { o.get_string("i"); }), Contains("allowed: a string"));
  CHECK(config_error([&] { o.get_string("long", {"x"}); }).size() < 200);

  CHECK(o.get_int_list("il", 1, 3) == std::vector<int64_t>{1, 2, 3});
  CHECK(o.get_int_list("empty", 1, 3).empty());
  CHECK(o.get_int_list("absent", 1, 3, std::vector<int64_t>{5}) == std::vector<int64_t>{5});
  CHECK_THAT(config_error([&] { o.get_int_list("bad_il", 0, 9); }),
             Equals("c.json: \"bad_il[1]\" is 2.5; allowed: an integer from 0 to 9"));
  CHECK_THAT(config_error([&] { o.get_int_list("il", 1, 2); }), Contains("\"il[2]\" is 3"));
  CHECK_THAT(config_error([&] { o.get_int_list("i", 1, 2); }), Contains("a list, each an integer"));

  CHECK(o.get_string_list("sl") == std::vector<std::string>{"a", "b"});
  CHECK(o.get_string_list("absent", {}, std::vector<std::string>{}).empty());
  CHECK_THAT(config_error([&] { o.get_string_list("sl", {"a"}); }), Contains("\"sl[1]\" is \"b\""));
  CHECK_THROWS_AS(o.get_string_list("bad_sl"), Error);
  CHECK_THROWS_AS(o.get_string_list("s"), Error);

  CHECK(o.has("null"));
  CHECK(o.is_null("null"));
  CHECK_FALSE(o.is_null("i"));
  CHECK_FALSE(o.has("absent"));
  CHECK_FALSE(o.is_null("absent"));
  CHECK(o.is_list("il"));
  CHECK_FALSE(o.is_list("i"));

  JsonObject inner = o.get_object("o");
  CHECK(inner.get_int("x", 0, 1) == 1);
  CHECK_THAT(config_error([&] { inner.get_int("y", 0, 1); }), Contains("c.json: \"o.y\" is 2"));
  CHECK_THAT(config_error([&] { inner.get_int("z", 0, 1); }), Contains("\"o.z\" is missing"));
  CHECK_THAT(config_error([&] { o.get_object("i"); }),
             Contains("\"i\" is 3; it must be an object"));
  CHECK_NOTHROW(o.get_object("absent").finish());
  CHECK_THAT(config_error([&] { o.reject("i", "a multiple of 4"); }),
             Equals("c.json: \"i\" is 3; allowed: a multiple of 4"));
}

TEST_CASE("json: unknown keys are named with the nearest known one", "[json]") {
  const json value = parse(R"({"in_channels":3,"out_chanels":3,"_version":"1"})");
  JsonObject o("c.json", value);
  o.get_int("in_channels", 1, 4);
  o.get_int("out_channels", 1, 4, 3);
  CHECK_THAT(config_error([&] { o.finish(); }), Contains("unknown key \"_version\"; remove it"));
  o.ignore("_version");
  CHECK_THAT(config_error([&] { o.finish(); }),
             Equals("c.json: unknown key \"out_chanels\"; did you mean \"out_channels\"?"));
  o.ignore("out_chanels");
  CHECK_NOTHROW(o.finish());
  const json steps = parse(R"({"stepz":1,"\n":2})");
  JsonObject scoped("c.json", steps, "train");
  scoped.has("steps");
  scoped.ignore("\n");
  CHECK_THAT(config_error([&] { scoped.finish(); }),
             Contains("\"train.stepz\"; did you mean \"steps\"?"));
}

TEST_CASE("nearest_name: finds what was meant, or nothing", "[nearest_name]") {
  const std::vector<std::string> names = {"steps", "seed", "batch-size", "learning-rate", "flip"};
  CHECK(nearest_name("step", names) == "steps");
  CHECK(nearest_name("stpes", names) == "steps");
  CHECK(nearest_name("sede", names) == "seed");
  CHECK(nearest_name("batchsize", names) == "batch-size");
  CHECK(nearest_name("batch_size", names) == "batch-size");
  CHECK(nearest_name("lerning-rat", names) == "learning-rate");
  CHECK(nearest_name("seed", names) == "seed");
  CHECK(nearest_name("wombat", names).empty());
  CHECK(nearest_name("zz", names).empty());
  CHECK(nearest_name("", names).empty());
  CHECK(nearest_name("x", {}).empty());
  CHECK(nearest_name(std::string(1 << 20, 'x'), names).empty());
  CHECK(nearest_name("ab", {"ac", "ad"}) == "ac");  // the first of equals
  CHECK(nearest_name("abcd", {"badc", "abdd"}) == "abdd");
  CHECK(nearest_name("abcd", {"badc"}) == "badc");  // two swaps, not four edits
  CHECK(did_you_mean("stepz", names) == "; did you mean \"steps\"?");
  CHECK(did_you_mean("wombat", names).empty());
}
