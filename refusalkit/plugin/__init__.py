"""List, check and start plugins: what stands behind `refusalkit plugins` and `refusalkit plugin`."""
