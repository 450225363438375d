"""Search: what is stored of videos, and how it is compared."""
