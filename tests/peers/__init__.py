"""Netloom beside Debian's reference plugins: the same requests, what each printed and what each made, compared."""
