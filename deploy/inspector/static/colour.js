// Every colour that data chooses comes from here, text colour included.
//
// The scale is diverging: blue above zero, orange below (told apart under the common forms of
// colour blindness). Between its ends each channel runs straight, so that the luminance stays
// between the ends' and one text colour a scheme keeps its contrast everywhere.

const SCHEMES = {
  light: {
    text: "#14161a",
    negative: [247, 164, 104],
    zero: [255, 255, 255],
    positive: [120, 180, 238],
    categories: [
      [205, 225, 246], [255, 222, 190], [206, 235, 205], [236, 213, 240], [250, 235, 160],
      [200, 236, 236],
    ],
  },
  dark: {
    text: "#f3f4f6",
    negative: [158, 76, 16],
    zero: [27, 30, 36],
    positive: [28, 92, 164],
    categories: [
      [32, 66, 104], [100, 58, 22], [34, 76, 42], [80, 46, 92], [86, 74, 16], [20, 80, 84],
    ],
  },
};

/** `light` or `dark`, as the reader's system asks for. */
export function scheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

/** Background and text colour of `share` in [-1, 1] of the scale. */
export function shade(share, name = scheme()) {
  const { text, negative, zero, positive } = SCHEMES[name];
  const end = share < 0 ? negative : positive;
  const size = Math.min(1, Math.abs(share));
  const channels = zero.map((from, index) => Math.round(from + (end[index] - from) * size));
  return { background: `rgb(${channels.join(", ")})`, text };
}

/** Background and text colour of one of several kinds; they repeat after six. */
export function category(index, name = scheme()) {
  const { text, categories } = SCHEMES[name];
  return { background: `rgb(${categories[index % categories.length].join(", ")})`, text };
}
