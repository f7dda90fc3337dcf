"""Deploying as a transaction: lease, plan, guard, verdict, journal, undo (DESIGN: "Deploying: a transaction")."""
