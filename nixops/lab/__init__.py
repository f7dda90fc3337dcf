"""Real hosts on one machine, for the tests, the demo and for trying things out. Nothing is loaded from here."""
