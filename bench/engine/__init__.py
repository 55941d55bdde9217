"""How anything is timed: sessions, measurements, memory, the machine, records and their summary."""
