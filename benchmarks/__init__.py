"""How s4 grows: series of measurements on real nodes of this machine. `make bench` runs them."""
