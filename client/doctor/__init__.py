"""What this machine has and lacks for WiCore, and what to do about it. Each finding has a section in the docs."""
