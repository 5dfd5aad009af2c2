// Pictures on their way in. What the server reads stays the bytes it was; what is another format, or larger than a
// vision tower has any use for, is drawn anew.

const SENT_AS_IS = new Set(["image/png", "image/jpeg", "image/webp"]);
const MAX_BYTES = 8 * 2 ** 20;
const MAX_PIXELS = 24 * 10 ** 6;
const REDRAWN_SIDE = 2048;

/** The picture in a file, `{ name, blob, width, height }`; null for what this browser cannot read as one. */
export async function readPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const { width, height } = bitmap;
  const fits = SENT_AS_IS.has(file.type) && file.size <= MAX_BYTES && width * height <= MAX_PIXELS;
  try {
    return fits ? { name: file.name, blob: file, width, height } : await redraw(file.name, bitmap);
  } finally {
    bitmap.close();
  }
}

async function redraw(name, bitmap) {
  const scale = Math.min(1, REDRAWN_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale));
  const height = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind what is transparent
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return { name, blob: await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }), width, height };
}

/** A blob as a data URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** A drawing to try the server on, as `readPicture` gives it: a red circle, a blue square and a yellow star. */
export async function samplePicture() {
  const side = 448;
  const canvas = new OffscreenCanvas(side, side);
  const context = canvas.getContext("2d");
  context.fillStyle = "#faf8f0";
  context.fillRect(0, 0, side, side);
  context.fillStyle = "#e63737";
  context.beginPath();
  context.arc(0.22 * side, 0.24 * side, 0.15 * side, 0, 2 * Math.PI);
  context.fill();
  context.fillStyle = "#285adc";
  context.fillRect(0.58 * side, 0.62 * side, 0.27 * side, 0.27 * side);
  context.fillStyle = "#f0d728";
  context.beginPath();
  for (let corner = 0; corner < 10; corner += 1) {
    const radius = (corner % 2 ? 0.09 : 0.2) * side;
    const angle = (Math.PI * corner) / 5 - Math.PI / 2;
    context.lineTo(0.78 * side + radius * Math.cos(angle), 0.24 * side + radius * Math.sin(angle));
  }
  context.fill();
  return { name: "drawing.png", blob: await canvas.convertToBlob(), width: side, height: side };
}
