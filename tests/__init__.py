"""The tests, in the same tree as the code; `make` lists how to run them."""
