#include "step.cpp"
