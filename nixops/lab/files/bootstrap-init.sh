#!/bin/sh
# The init of the generation that a host has before anything is installed on it: there is nothing to activate.
exit 0
