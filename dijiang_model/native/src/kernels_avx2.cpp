#include "choose.cpp"
#include "step.cpp"
#include "decode.cpp"
