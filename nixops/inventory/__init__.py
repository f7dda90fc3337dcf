"""The typed inventory: :mod:`.model` is what it holds, :mod:`.load` reads it with positions and origins."""
