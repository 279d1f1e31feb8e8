// The known name that a mistyped word most likely meant, for error messages.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace ddpm {

// The name with the fewest edits (insert, delete, replace, swap neighbours) from `word`, the first
// of equals; empty where none is near: more than a third of the word's letters, and more than 2,
// differ.
std::string nearest_name(std::string_view word, const std::vector<std::string>& names);

// "; did you mean \"x\"?", or nothing where no name is near.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& names);

}  // namespace ddpm
