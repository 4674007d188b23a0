#include "choose.cpp"
#include "step.cpp"
