"""A small world to train in: emoji artwork of several styles in procedural places.

Real pictures with free licences (REFERENCE 8): thousands of things, each drawn in several styles and each with a name.
The same thing looks different in every style, which is what makes identity measurable: same word, another look.
"""
