"""A small world to train in: emoji artwork of several styles in front of procedural backgrounds.

The artwork has free licences: thousands of things, each in several styles and each with a name. The same thing looks
different in every style, which is what makes identity measurable: the word is the same, the appearance is another.
"""
