// The Vercel AI SDK with its OpenAI-compatible provider: text, stream, object. Writes what it got as JSON.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "dijiang",
  baseURL: process.env.BASE_URL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(process.argv[2]);
const plain = { model, prompt: "Hé?", maxOutputTokens: 8, temperature: 0, maxRetries: 0 };

const whole = await generateText(plain);
const stream = streamText(plain);
let streamed = "";
for await (const text of stream.textStream) streamed += text;
const { object } = await generateObject({
  ...plain,
  maxOutputTokens: 400,
  schema: z.object({ city: z.enum(["Paris", "Tokyo"]), size: z.number().int().min(0).max(9) }),
});
console.log(
  JSON.stringify({
    whole: whole.text,
    usage: whole.usage.outputTokens,
    streamed,
    streamUsage: (await stream.usage).outputTokens,
    parsed: object,
  }),
);
