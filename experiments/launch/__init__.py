"""How a command starts and stops: flags, signals, devices, hosts."""
