// Dispatch: which instruction set this CPU has, and which one is in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace localmimo {

std::vector<std::string> supported();     // best first
const Kernels& kernels();                 // the one in use
bool force(const std::string& name);      // "" goes back to the best; false: unknown or not supported

}  // namespace localmimo
