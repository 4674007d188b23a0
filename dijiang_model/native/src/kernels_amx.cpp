#include "choose.cpp"
#include "draw.cpp"
#include "step.cpp"
#include "decode.cpp"
