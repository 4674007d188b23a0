// What every program here asks, and how it says what it got.
import { z } from "zod";

export const model = process.argv[2];
export const baseURL = process.env.BASE_URL;
export const rootURL = baseURL.replace(/\/v1$/, "");
export const question = "Hé?";
export const nobody = "nobody"; // a model that is not there
export const short = 8;
export const long = 400;
export const place = z.object({ city: z.enum(["Paris", "Tokyo"]), size: z.number().int().min(0).max(9) }).strict();
export const schema = z.toJSONSchema(place);

export async function failure(ask) {
  try {
    await ask();
  } catch (error) {
    return `${error.constructor.name}: ${error.message} ${error.responseBody ?? ""} ${error.lastError?.responseBody ?? ""}`;
  }
  throw new Error("no error");
}

export function report(got) {
  console.log(JSON.stringify(got)); // text, streamed, calls, structured, usage, error
}
