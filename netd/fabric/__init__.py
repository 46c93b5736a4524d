"""How packets get to containers of other hosts: the contract, one file for each way, and the table of them."""
