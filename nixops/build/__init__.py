"""Building on a pool of builders that survives its builders; images, their push and their record."""
