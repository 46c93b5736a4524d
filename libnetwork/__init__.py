"""Docker's remote network driver and IPAM driver, turned into the CNI calls that a runtime would make."""
